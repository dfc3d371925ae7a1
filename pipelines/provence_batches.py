"""From training rows to padded batches: tokens, windows, draws and length-sorted batches.

Each sentence is tokenised by itself and the ids are joined, exactly as the inference engine does,
so that training and inference see the same ids:

    [CLS] question [SEP] title sentence_1 ... sentence_n [SEP]

What an epoch holds is a pure function of (rows, options, seed, epoch): a resumed run rebuilds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .provence_rows import TrainRow

CHUNK = 512


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row in token ids. `answer` marks, per sentence, the tokens inside an answer string."""

    question: list[int]
    title: list[int]
    sentences: list[list[int]]
    labels: tuple[int, ...]
    answer: list[list[bool]]
    teacher_score: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class Example:
    """One window of one row.

    ids (T,); start: first passage token; segment (T,): index into `labels`, -1 outside sentences;
    answer (T,): 1 in an answer, 0 not, -1 unknown; relevant: the row has a sentence to keep.
    """

    ids: list[int]
    start: int
    segment: list[int]
    labels: list[int]
    answer: list[int]
    relevant: bool
    teacher_score: float | None


class Batch(NamedTuple):
    """B windows padded to T tokens and S sentences.

    input_ids, attention_mask, token_type_ids, segment: (B, T) int64. answer: (B, T) float32.
    labels: (B, S) float32, -1 where ignored or absent. relevant: (B,) float32.
    teacher: (B,) float32, NaN where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    segment: Tensor
    answer: Tensor
    labels: Tensor
    relevant: Tensor
    teacher: Tensor


class Special(NamedTuple):
    """Ids of the special tokens; `mask` falls back to `pad` where a tokenizer has none."""

    cls: int
    sep: int
    pad: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        """From a Hugging Face tokenizer (XLM-R's <s> and </s> stand in its cls and sep)."""
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        if None in ids:
            raise InputError(f"tokenizer: expected cls, sep and pad tokens, found ids {ids}")
        return cls(
            *ids,
            tokenizer.pad_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id,
        )


def tokenise_rows(tokenizer: Any, rows: Sequence[TrainRow]) -> list[TokenRow]:
    """Token ids of every row, sentence by sentence."""
    made: list[TokenRow] = []
    for at in range(0, len(rows), CHUNK):
        part = rows[at : at + CHUNK]
        texts = [text for row in part for text in row.texts]
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        plain = tokenizer(
            [row.question for row in part] + [row.title or "" for row in part],
            add_special_tokens=False,
            verbose=False,
        )["input_ids"]
        i = 0
        for j, row in enumerate(part):
            n = len(row.sentences)
            answer = [
                _in_answer(text, offsets, row.answers if label == 1 else ())
                for text, offsets, label in zip(
                    texts[i : i + n], encoded["offset_mapping"][i : i + n], row.labels, strict=True
                )
            ]
            made.append(
                TokenRow(
                    question=list(plain[j]),
                    title=list(plain[len(part) + j]) if row.title else [],
                    sentences=[list(x) for x in encoded["input_ids"][i : i + n]],
                    labels=row.labels,
                    answer=answer,
                    teacher_score=row.teacher_score,
                    weight=row.weight,
                )
            )
            i += n
    return made


def _in_answer(text: str, offsets: Sequence[tuple[int, int]], answers: Sequence[str]) -> list[bool]:
    inside = [False] * len(offsets)
    for answer in answers:
        at = text.find(answer) if answer else -1
        if at >= 0:
            for k, (start, end) in enumerate(offsets):
                inside[k] = inside[k] or (start < at + len(answer) and end > at)
    return inside


def make_example(row: TokenRow, special: Special, max_length: int, *, title: bool) -> Example:
    """One window: around the first sentence to keep where the passage does not fit, else its start.

    The question is cut so that the passage keeps at least half of the window.
    """
    question = row.question[: max_length // 2 - 2]
    ids = [special.cls, *question, special.sep]
    start = len(ids)
    known = any(any(flags) for flags in row.answer)
    if title and row.title:
        ids += row.title[: (max_length - start) // 2]
    segment, answer = [-1] * len(ids), [-1] * len(ids)
    labels: list[int] = []
    room = max_length - len(ids) - 1
    for k in _window(row, room):
        tokens = row.sentences[k][: max_length - 1 - len(ids)]
        if not tokens:
            continue
        ids += tokens
        segment += [len(labels)] * len(tokens)
        flags = row.answer[k][: len(tokens)]
        answer += [int(flag) for flag in flags] if known else [-1] * len(tokens)
        labels.append(row.labels[k])
    ids.append(special.sep)
    segment.append(-1)
    answer.append(-1)
    return Example(ids, start, segment, labels, answer, 1 in row.labels, row.teacher_score)


def _window(row: TokenRow, room: int) -> range:
    """Sentences of the window: grown from the first one to keep, backwards first."""
    sizes = [len(tokens) for tokens in row.sentences]
    if sum(sizes) <= room or 1 not in row.labels:
        return range(len(sizes))
    low = row.labels.index(1)
    high, used = low + 1, sizes[low]
    while True:
        if low > 0 and used + sizes[low - 1] <= room:
            low -= 1
            used += sizes[low]
        elif high < len(sizes) and used + sizes[high] <= room:
            used += sizes[high]
            high += 1
        else:
            return range(low, high)


def draw_epoch(
    rows: Sequence[TokenRow],
    special: Special,
    *,
    max_length: int,
    title_dropout: float,
    token_mask: float,
    seed: int,
    epoch: int,
) -> list[Example]:
    """Windows of one epoch: rows drawn by weight, titles and tokens hidden at random."""
    rng = np.random.default_rng([seed, epoch])
    chance = rng.random((len(rows), 2))
    made: list[Example] = []
    for row, (drawn, titled) in zip(rows, chance, strict=True):
        whole = int(row.weight)
        for _ in range(whole + int(drawn < row.weight - whole)):
            example = make_example(row, special, max_length, title=titled >= title_dropout)
            if example.labels:
                made.append(example)
    if token_mask > 0:
        for example in made:
            hidden = rng.random(len(example.ids)) < token_mask
            for k in np.flatnonzero(hidden[1:-1]) + 1:
                if example.ids[k] != special.sep:
                    example.ids[k] = special.mask
    return made


def batch_by_length(
    lengths: Sequence[int], batch_tokens: int, rng: np.random.Generator | None = None
) -> list[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens (one window at least).

    Sorted by length; with `rng`, lengths are jittered and the batches shuffled.
    """
    size = np.asarray(lengths, dtype=np.float64)
    jitter = rng.random(len(size)) * 12 if rng is not None else 0.0
    batches: list[list[int]] = []
    current: list[int] = []
    widest = 0
    for i in np.argsort(size + jitter, kind="stable"):
        wide = max(widest, int(size[i]))
        if current and wide * (len(current) + 1) > batch_tokens:
            batches.append(current)
            current, wide = [], int(size[i])
        current.append(int(i))
        widest = wide
    if current:
        batches.append(current)
    if rng is not None:
        batches = [batches[int(i)] for i in rng.permutation(len(batches))]
    return batches


def collate(examples: Sequence[Example], special: Special) -> Batch:
    """Pad windows to a batch."""
    b, t = len(examples), max(len(e.ids) for e in examples)
    s = max(len(e.labels) for e in examples)
    ids = np.full((b, t), special.pad, np.int64)
    mask, types = np.zeros((b, t), np.int64), np.zeros((b, t), np.int64)
    segment, answer = np.full((b, t), -1, np.int64), np.full((b, t), -1.0, np.float32)
    labels = np.full((b, s), -1.0, np.float32)
    for i, e in enumerate(examples):
        n = len(e.ids)
        ids[i, :n], mask[i, :n], types[i, e.start : n] = e.ids, 1, 1
        segment[i, :n], answer[i, :n], labels[i, : len(e.labels)] = e.segment, e.answer, e.labels
    relevant = np.array([e.relevant for e in examples], np.float32)
    teacher = np.array(
        [np.nan if e.teacher_score is None else e.teacher_score for e in examples], np.float32
    )
    arrays = (ids, mask, types, segment, answer, labels, relevant, teacher)
    return Batch._make(torch.from_numpy(x) for x in arrays)
