"""The tokens that stand for the classes, and the log probabilities of the classes from theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...errors import InputError, ModelError, RecipeError
from ..contract import FloatArray, IntArray
from .black_box import Template
from .rendered import Ids, Rendered, Renderer

LabelTokens = Literal["all", "first"]


class TokenLabels:
    """What a box over a network's tokens has, whatever reads them: texts, words, their tokens."""

    _texts: Renderer
    _words: list[Ids]

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self._words)

    def input_tokens(self, prompts: Sequence[str], rows: Sequence[str]) -> IntArray:
        """Tokens (P, N) int64: of the rendered text, and all but the last of each word."""
        found = self._texts(prompts, rows)
        made: IntArray = found.by_prompt(found.lengths()) + read_beyond(self._words)
        return made


def check_batch(batch_tokens: int) -> int:
    """Refuse a batch without tokens; return it."""
    if batch_tokens < 1:
        raise InputError(f"`batch_tokens` is at least 1; found {batch_tokens}.")
    return batch_tokens


def words_after(tokenizer: Any, template: Template, labels: Sequence[str], cut: int) -> list[Ids]:
    """Tokens of each word, written after a text that the template ends (causal models).

    A space stands between, unless the template itself ends in white space. The tokens are taken
    behind a plain word and then hold for every text: what a row or a prompt ends in changes
    nothing about them. `cut` special tokens behind a text are left off.
    """
    text = template.render(prompt="x", text="x")
    space = "" if text[-1:].isspace() else " "
    start = _encoded(tokenizer, text, cut)
    made = []
    for label in labels:
        ids = _encoded(tokenizer, text + space + label, cut)
        if ids[: len(start)] != start:
            raise RecipeError(
                f"template {template.source!r}: the word {label!r} cannot be written after it"
                " without changing the tokens before the word. Take the white space off its end."
            )
        made.append(ids[len(start) :])
    return made


def words_inside(tokenizer: Any, template: Template, labels: Sequence[str]) -> list[Ids]:
    """Tokens of each word, written where the template has `{mask}` (masked models).

    So a word gets the mark of a word's start that the tokenizer gives it there.
    """
    gap = _encoded(tokenizer, template.render(prompt="x", text="x", mask=tokenizer.mask_token), 0)
    if gap.count(tokenizer.mask_token_id) != 1:
        raise RecipeError(f"template {template.source!r}: {{mask}} is not read as one token.")
    place = gap.index(tokenizer.mask_token_id)
    head, tail = gap[:place], gap[place + 1 :]
    # Before the mask a space may be a token of its own, which a word takes into itself.
    blank = head and not tokenizer.decode([head[-1]], skip_special_tokens=True).strip()
    heads = [head, head[:-1]] if blank and head[-1] not in tokenizer.all_special_ids else [head]
    made = []
    for label in labels:
        ids = _encoded(tokenizer, template.render(prompt="x", text="x", mask=label), 0)
        fit = [start for start in heads if _between(ids, start, tail)]
        if not fit:
            raise RecipeError(
                f"template {template.source!r}: the word {label!r} cannot be written at {{mask}}"
                " without changing the tokens beside it. Put spaces around {mask}."
            )
        made.append(ids[len(fit[0]) : len(ids) - len(tail)])
    return made


def _between(ids: Ids, head: Ids, tail: Ids) -> bool:
    """Whether something stands between those ends."""
    inner = len(ids) - len(tail)
    return inner > len(head) and ids[: len(head)] == head and ids[inner:] == tail


def words_alone(tokenizer: Any, labels: Sequence[str]) -> list[Ids]:
    """Tokens of each word as the beginning of an answer (sequence-to-sequence models)."""
    found = tokenizer(list(labels), add_special_tokens=False, verbose=False)["input_ids"]
    return [tuple(ids) for ids in found]


def _encoded(tokenizer: Any, text: str, cut: int) -> Ids:
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return tuple(ids[: len(ids) - cut])


def chosen_tokens(
    words: Sequence[Ids], labels: Sequence[str], label_tokens: LabelTokens, tokenizer: Any
) -> list[Ids]:
    """The tokens that are scored: all of each word, or its first.

    Raises
    ------
    InputError
        Fewer than two labels, or `label_tokens` is neither.
    RecipeError
        A word has no tokens, one that the vocabulary lacks, or the same ones as another.
    """
    if len(labels) < 2:
        raise InputError(f"expected words for at least 2 classes, found {list(labels)}.")
    if label_tokens not in ("all", "first"):
        raise InputError(f"`label_tokens` is 'all' or 'first'; found {label_tokens!r}.")
    taken: dict[Ids, str] = {}
    made = []
    for label, ids in zip(labels, words, strict=True):
        some = ids[:1] if label_tokens == "first" else ids
        if not some:
            raise RecipeError(f"the word {label!r} has no tokens in this model. Give another.")
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in some:
            raise RecipeError(
                f"the vocabulary of this model lacks the word {label!r} (it is read as"
                f" {tokenizer.unk_token}). Give another."
            )
        if some in taken:
            what = "the first token" if label_tokens == "first" else "the tokens"
            pieces = " ".join(tokenizer.convert_ids_to_tokens(list(some)))
            raise RecipeError(
                f"the words {taken[some]!r} and {label!r} share {what} {pieces!r}. Give words that"
                " differ" + (", or score all tokens." if label_tokens == "first" else ".")
            )
        taken[some] = label
        made.append(some)
    return made


def beginnings(words: Sequence[Ids]) -> list[Ids]:
    """What of the words the model has to read to be asked for their next tokens, by length."""
    found = {ids[:size] for ids in words for size in range(1, len(ids))}
    return sorted(found, key=lambda ids: (len(ids), ids))


def read_beyond(words: Sequence[Ids]) -> int:
    """Tokens of the words that are read beside the text: all but each one's last."""
    return sum(len(ids) - 1 for ids in words)


def class_logprobs(scores: torch.Tensor) -> FloatArray:
    """Scores (..., C) of the words to log probabilities of the classes, float32 on the CPU.

    Raises ModelError where they are not finite.
    """
    made = torch.log_softmax(scores.double(), dim=-1).float().cpu().numpy()
    if not np.isfinite(made).all():
        raise ModelError(
            "expected finite log probabilities of the words; the model gives others. Use float32,"
            " or another model."
        )
    return np.asarray(made, np.float32)


def window_of(model: Any, tokenizer: Any) -> int | None:
    """Tokens that a model reads at most; None where nothing says so.

    That is the length of its positions, less those kept for padding (RoBERTa); of a model
    without (T5) what its tokenizer names.
    """
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        named = int(tokenizer.model_max_length)
        return named if named < 10**9 else None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx
            return module.num_embeddings - (0 if padding is None else padding + 1)
    return int(most)


def check_window(found: Rendered, more: int, window: int | None, rows: Sequence[str]) -> IntArray:
    """Lengths (P, N) of the inputs, each held against the window with `more` tokens added.

    Raises
    ------
    InputError
        An input is longer than the window, or has no tokens.
    """
    lengths: IntArray = found.by_prompt(found.lengths())
    if lengths.size and not lengths.min():
        p, n = np.argwhere(lengths == 0)[0]
        raise InputError(f"row {n} with prompt {p} has no tokens. Leave rows without text out.")
    if window is not None and lengths.size and lengths.max() + more > window:
        p, n = np.argwhere(lengths + more > window)[0]
        raise InputError(
            f"row {n} ({rows[n][:80]!r}) with prompt {p} is {int(lengths[p, n]) + more} tokens"
            f" long; the model reads {window}. Shorten the row, or leave it out."
        )
    return lengths


def batches(lengths: IntArray, most: int) -> list[IntArray]:
    """Places sorted by length, cut so that a batch padded to its longest has at most `most`."""
    order = np.argsort(lengths, kind="stable")
    made, start = [], 0
    for at in range(1, len(order) + 1):
        if at == len(order) or (at + 1 - start) * lengths[order[at]] > most:
            made.append(order[start:at])
            start = at
    return made


def padded(sequences: Sequence[Ids], fill: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) int64 ids padded on the right, and their lengths (B,)."""
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    made = np.full((len(sequences), int(lengths.max())), fill, np.int64)
    made[np.arange(made.shape[1])[None] < lengths[:, None]] = np.concatenate(
        [np.asarray(ids, np.int64) for ids in sequences]
    )
    return torch.from_numpy(made).to(device), torch.from_numpy(lengths).to(device)


def refuse_ids(model: Any, words: Sequence[Ids]) -> None:
    """Refuse a tokenizer that has ids beyond the model's vocabulary."""
    size = int(model.get_input_embeddings().weight.shape[0])
    for ids in words:
        if max(ids) >= size:
            raise ModelError(
                f"the tokenizer gives the id {max(ids)}; the model knows {size}. Use the"
                " tokenizer that was saved with the model."
            )
