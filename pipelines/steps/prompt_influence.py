"""Step `prompt_influence`: what each candidate word changes, alone, against the empty prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from ...errors import RecipeError
from ...storage import Table, TableWriter, row_id
from ..engine import Job, Plan, Slot, StepContext, StepSpec, use_threads, write_whole
from ..prompts.asking import AskOptions
from ..prompts.tables import INFLUENCE, REWARDS
from ..prompts.task import task_of
from ..prompts.words import rows_of, words_of

WORD_TABLES = ("cluster_tokens", "prompt_vocabulary")


class InfluenceOptions(AskOptions):
    """Options of `prompt_influence`, beside those of every step that asks.

    Attributes
    ----------
    halving
        Rows of each class that a successive halving starts with: it doubles them and halves the
        words until all rows are asked, at about half the queries. None asks every word on every
        row.
    least
        Share of the words that halving leaves at the end, at least: not below what
        prune_prompts is to keep.
    halving_by
        The reward that halving ranks by.
    """

    halving: int | None = Field(default=None, ge=1)
    least: float = Field(default=0.1, gt=0.0, le=1.0)
    halving_by: str = "log_likelihood"

    @model_validator(mode="after")
    def _known_reward(self) -> InfluenceOptions:
        if self.halving_by not in REWARDS:
            raise ValueError(f"`halving_by` is one of {', '.join(REWARDS)}")
        return self


def least_words(options: InfluenceOptions, words: int) -> int:
    """Words that halving leaves at the end, at least."""
    from ...pruners import rules

    return max(1, rules.count_of(words, options.least))


def plan(options: InfluenceOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: halving looks at all words, and the log of answers is the journal."""
    from ..prompts.boxes import box_digests

    task = task_of(inputs["task"])
    if options.halving is not None and options.halving > task.shots:
        raise RecipeError(
            f"`halving` starts with {options.halving} rows a class; the task has {task.shots}."
        )
    return Plan(INFLUENCE, None, options.identity(), models=box_digests(task))


def finish(job: Job, writer: TableWriter) -> None:
    """Ask, and write a row for the empty prompt and each word.

    Raises
    ------
    BudgetError
        The budget does not reach for all of it.
    """
    from ..prompts.boxes import open_asker, warn_unseen
    from ..prompts.influence import measure_influence

    options: InfluenceOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    task = job.input("task")
    rows, words = rows_of(task), words_of(job.input("words"))
    asker = open_asker(task, rows.texts, options)
    made = measure_influence(
        asker,
        rows.labels,
        rows.shot,
        words.texts,
        words.ids,
        start_shots=options.halving,
        least=least_words(options, len(words.texts)),
        by=options.halving_by,
    )
    warn_unseen(asker)
    n = len(rows.texts)
    columns = {
        "id": np.r_[row_id("prompt_word", ""), words.ids],
        "text": ["", *words.texts],
        "rows_seen": np.r_[n, made.rows_seen].astype(np.int32),
        "finalist": np.r_[True, made.finalist],
        **{name: np.r_[0.0, made.influence[name]].astype(np.float32) for name in REWARDS},
        "accuracy": np.r_[0.0, made.accuracy].astype(np.float32),
        "tokens": np.r_[made.empty_tokens, made.tokens],
        "log_probability": [part.ravel() for part in (made.empty, *made.logprobs)],
    }
    write_whole(writer, pa.table(columns, schema=INFLUENCE))


SPEC = StepSpec(
    name="prompt_influence",
    version=1,
    options=InfluenceOptions,
    inputs={"task": Slot(("prompt_task",)), "words": Slot(WORD_TABLES)},
    plan=plan,
    finish=finish,
    about="What each candidate word changes, alone, against the empty prompt.",
)
