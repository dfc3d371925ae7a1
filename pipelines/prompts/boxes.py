"""A task's black box, opened on this machine or behind its endpoint, and its log of answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ...errors import PruneryWarning
from ...pruners.signals.black_box import BlackBox
from .asking import Asker, AskOptions, RemoteBox
from .task import PromptTaskOptions, classes_of, task_of

if TYPE_CHECKING:
    from ...storage import Table

# Of a description of a class, about; a batch of longer texts is as many times larger.
_TOKENS_A_TEXT = 64


def box_digests(task: PromptTaskOptions) -> dict[str, str]:
    """Digests of the models that answer, by role; of an endpoint nothing is known but its name."""
    from .. import models

    if task.black_box == "endpoint":
        return {}
    if task.black_box == "encoder":
        return {"model": models.encoder(task.model).sha256}
    from ...pruners.models.language import resolve_language

    found = resolve_language(task.model, task.black_box)
    return {"model": found.sha256, "tokenizer": found.tokenizer_sha256}


def open_box(
    task: PromptTaskOptions, classes: Sequence[str], how: AskOptions
) -> BlackBox | RemoteBox:
    """The black box of a task.

    Raises
    ------
    ModelError
        The model cannot be found or read.
    RecipeError
        Its labels or templates do not fit it.
    """
    words = task.words(classes)
    template, label_template = task.templates()
    if task.black_box == "encoder":
        from ...pruners.signals.encoder_labels import EncoderLabels
        from .. import models

        folder = str(models.encoder(task.model).path)
        encoder = models.sentence_encoder(folder, how.device, task.dtype)
        return EncoderLabels(
            partial(encoder.encode, batch_size=max(1, how.batch_tokens // _TOKENS_A_TEXT)),
            encoder.count_tokens,
            words,
            template=template,
            label_template=label_template,
            temperature=task.temperature,
        )
    if task.black_box == "endpoint":
        from .endpoint import EndpointLabels

        return EndpointLabels(task, words, how)
    from ...pruners.signals.language_labels import open_labels
    from .. import models

    with models.without_bars():
        return open_labels(
            task.black_box,
            task.model,
            words,
            template,
            device=how.device,
            dtype=task.dtype,
            batch_tokens=how.batch_tokens,
            label_tokens=task.verbaliser_tokens,
        )


def open_asker(task: Table, rows: Sequence[str], how: AskOptions) -> Asker:
    """What a step asks with: the task's box, its budget, and the log of answers."""
    options, classes = task_of(task), classes_of(task)
    log = None
    if how.remember:
        from .answer_log import SqliteLog, log_path

        log = SqliteLog(log_path(options, options.words(classes), box_digests(options)))
    box = open_box(options, classes, how)
    batch = how.concurrency if isinstance(box, RemoteBox) else max(64, how.batch_tokens // 16)
    return Asker(box, rows, how.limits(), log, batch)


def warn_unseen(asker: Asker) -> None:
    """Say how often an endpoint left classes out of what it returned, if it did."""
    blind, bounded = (int(getattr(asker.box, name, 0)) for name in ("blind", "bounded"))
    if not blind and not bounded:
        return
    warnings.warn(
        f"of {asker.spent.sent} replies {blind} held no class at all, which counts as all classes"
        f" alike, and in the others {bounded} classes were missing and got the most that they can"
        " have. Raise `top_logprobs`, or give words that the model would write after the template.",
        PruneryWarning,
        stacklevel=2,
    )
