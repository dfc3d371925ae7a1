"""Rows to recover a model on: those trained on, those held out, and batches of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import InputError
from ...pruners.rules import best_first, count_of, mix, uniform
from ...storage import Table
from .calibration import IGNORED

Ints = npt.NDArray[np.int64]
FEWEST = 10
"""Rows below which nothing is trained: a held-out tenth would be no row."""

_MASKED = 0.15
_HELD, _HIDDEN = 1 << 40, 1 << 41  # streams of random numbers that no epoch uses


@dataclass(frozen=True, slots=True)
class Rows:
    """The N rows of a table of calibration rows.

    Attributes
    ----------
    ids
        (N,) int64.
    input_ids, labels
        (L,) int64 each; a label is the token itself, or -100 where it is not trained.
    name
        Of the table, for messages.
    """

    ids: Ints
    input_ids: list[Ints]
    labels: list[Ints]
    name: str

    def take(self, at: Ints) -> Rows:
        """Some of them, in that order."""
        ids, labels = [self.input_ids[i] for i in at], [self.labels[i] for i in at]
        return Rows(self.ids[at], ids, labels, self.name)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows padded on the right.

    Attributes
    ----------
    ids
        Of the rows, (B,) int64.
    input_ids, valid
        (B, T) int64, and (B, T) bool: False where padded.
    labels
        (B, T) int64: what is to be told at each place itself, -100 where nothing is.
    """

    ids: Ints
    input_ids: Tensor
    valid: Tensor
    labels: Tensor

    def targets(self, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Rows and positions of the targets, (N,) int64 each, row by row.

        A causal model tells the token at position t from its logits at t - 1, so that position 0
        is no target.
        """
        wanted = self.labels != IGNORED
        if causal:
            wanted = wanted.clone()
            wanted[:, 0] = False
        row, position = wanted.nonzero(as_tuple=True)
        return row, position


def read_rows(table: Table, vocabulary: int, longest: int | None) -> Rows:
    """Read rows that have a target.

    Raises
    ------
    InputError
        Fewer than `FEWEST`; a token id that the model does not know; or a row beyond `longest`.
    """
    name = table.manifest.name
    found = table.to_table(["id", "input_ids", "labels"]).to_pylist()
    ids, inputs, labels = [], [], []
    for row in found:
        tokens, wanted = np.array(row["input_ids"], np.int64), np.array(row["labels"], np.int64)
        _check_row(f"`{name}`, row {row['id']}", tokens, wanted, vocabulary, longest)
        if (wanted[1:] != IGNORED).any():
            ids.append(int(row["id"]))
            inputs.append(tokens)
            labels.append(wanted)
    if len(ids) < FEWEST:
        raise InputError(
            f"`{name}`: expected at least {FEWEST} rows with a target to recover a model on (a part"
            f" is held out); found {len(ids)}. Raise `rows` of its calibration_rows step."
        )
    return Rows(np.array(ids, np.int64), inputs, labels, name)


def _check_row(
    where: str, tokens: Ints, labels: Ints, vocabulary: int, longest: int | None
) -> None:
    if len(tokens) != len(labels):
        raise InputError(
            f"{where}: expected a label for each token; found {len(tokens)} tokens and"
            f" {len(labels)} labels. Make calibration_rows again."
        )
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocabulary))
    if len(outside):
        raise InputError(
            f"{where}: expected token ids below {vocabulary}; found {tokens[outside[0]]} at"
            f" position {outside[0]}. Make the rows with the model's own tokenizer."
        )
    if longest is not None and len(tokens) > longest:
        raise InputError(
            f"{where}: expected at most {longest} tokens, which is as far as the model's positions"
            f" reach; found {len(tokens)}. Lower `length` of its calibration_rows step."
        )


def split_rows(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(trained, held out): ceil(share * N) rows are held out, told by (seed, id) alone."""
    drawn = uniform(_stream(seed, _HELD), rows.ids)
    order = best_first(drawn, rows.ids)
    held = count_of(len(rows.ids), share)
    return rows.take(np.sort(order[held:])), rows.take(np.sort(order[:held]))


def training_batches(
    rows: Rows, *, tokens: int, pad: int, seed: int, mask: int | None
) -> Iterator[RowBatch]:
    """Endless batches of at most `tokens` padded tokens (a longer row goes alone).

    Rows come in a new order in every epoch, from (seed, epoch). With `mask`, the id of a mask
    token, a new 15 % of each row's trained tokens is hidden in every epoch.
    """
    epoch = 0
    while True:
        drawn = uniform(_stream(seed, epoch), rows.ids)
        order = best_first(drawn, rows.ids)
        for group in _groups([len(rows.input_ids[i]) for i in order], tokens):
            yield _batch(rows.take(order[group]), pad, mask, _stream(seed, _HIDDEN + epoch))
        epoch += 1


def fixed_batches(
    rows: Rows, *, tokens: int, pad: int, seed: int, mask: int | None
) -> list[RowBatch]:
    """Every row once, rows of like length together; the same at every call."""
    lengths = np.array([len(row) for row in rows.input_ids])
    order = np.lexsort((rows.ids, lengths))
    stream = _stream(seed, _HIDDEN - 1)
    return [
        _batch(rows.take(order[group]), pad, mask, stream)
        for group in _groups(lengths[order].tolist(), tokens)
    ]


def _groups(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    start, longest = 0, 0
    for at, length in enumerate(lengths):
        if at > start and (at + 1 - start) * max(longest, length) > tokens:
            yield slice(start, at)
            start, longest = at, 0
        longest = max(longest, length)
    if start < len(lengths):
        yield slice(start, len(lengths))


def _batch(rows: Rows, pad: int, mask: int | None, stream: int) -> RowBatch:
    longest = max(len(row) for row in rows.input_ids)
    shape = (len(rows.ids), longest)
    ids = np.full(shape, pad, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    valid = np.zeros(shape, np.bool_)
    for at, (tokens, wanted) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
        tell = wanted
        if mask is not None:
            hidden = hidden_places(int(rows.ids[at]), wanted, stream)
            tell = np.full(len(tokens), IGNORED, np.int64)
            tell[hidden] = tokens[hidden]
            tokens = tokens.copy()
            tokens[hidden] = mask
        ids[at, : len(tokens)], labels[at, : len(tokens)] = tokens, tell
        valid[at, : len(tokens)] = True
    made: tuple[Any, ...] = tuple(torch.from_numpy(part) for part in (ids, valid, labels))
    return RowBatch(rows.ids, *made)


def hidden_places(id_: int, labels: Ints, stream: int) -> Ints:
    """Positions of a row that a masked model has to tell: 15 % of the trained ones, at least one.

    Each is replaced by the mask token; BERT's 80/10/10 rule (arXiv:1810.04805), made for training
    from the start, is left out.
    """
    trained = np.flatnonzero(labels != IGNORED).astype(np.int64)
    with np.errstate(over="ignore"):
        named = mix(np.uint64(id_ & 0xFFFFFFFFFFFFFFFF)) + trained.astype(np.uint64)
    order = best_first(uniform(stream, named.astype(np.int64)), trained)
    return np.sort(trained[order[: count_of(len(trained), _MASKED)]])


def _stream(seed: int, part: int) -> int:
    """A seed for one part of the work, from the step's."""
    with np.errstate(over="ignore"):
        return int(mix(mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) + np.uint64(part)))
