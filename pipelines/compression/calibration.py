"""Which rows a model is calibrated on: from any table, by chance, strata, score or domain.

A choice is an order of the source rows; rows are made from it until there are enough. The same
table, options and seed give the same rows, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners.rules import mix, rank_in_group, uniform

Choice = Literal["random", "stratified", "balanced", "highest", "lowest", "first"]
Part = Literal["all", "calibration", "evaluation"]
Ints = npt.NDArray[np.int64]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sources:
    """The N rows to choose from.

    Attributes
    ----------
    ids
        (N,) int64.
    domains
        (N,) text; "" where there are none.
    score
        (N,) float32, or None.
    """

    ids: Ints
    domains: npt.NDArray[np.object_]
    score: npt.NDArray[np.float32] | None

    def take(self, at: npt.NDArray[np.bool_] | Ints) -> Sources:
        """Some of them."""
        score = None if self.score is None else self.score[at]
        return Sources(self.ids[at], self.domains[at], score)


def part_of(sources: Sources, part: Part, share: float, seed: int) -> Sources:
    """The rows of one part: `share` of all are for evaluation, told by (seed, id) alone.

    No row is in both parts, so that a model is not judged on what it was calibrated on.
    """
    if part == "all":
        return sources
    # Another stream than that of the choice, which would else prefer one part's rows.
    held = uniform(int(mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF))), sources.ids) < share
    return sources.take(held if part == "evaluation" else ~held)


def order_of(sources: Sources, choice: Choice, seed: int) -> Ints:
    """Positions of the sources, the first choice first; ties go to the smaller id.

    "random": by (seed, id). "stratified": at random, every domain in proportion to its size at
    any length of the list. "balanced": at random, every domain as often as the others while it
    lasts. "highest", "lowest": by score. "first": by id.
    """
    n = len(sources.ids)
    drawn = uniform(seed, sources.ids)
    if choice in ("highest", "lowest"):
        if sources.score is None:
            raise InputError(
                f"choose: {choice} needs a score; found none. Give the input `scores` and the"
                " option `score`, or choose: random."
            )
        key = -sources.score.astype(np.float64) if choice == "highest" else sources.score
        return np.lexsort((sources.ids, key))
    if choice == "first":
        return np.argsort(sources.ids, kind="stable")
    if choice == "random":
        return np.lexsort((sources.ids, drawn))
    _, group, sizes = np.unique(
        sources.domains.astype(str) if n else np.zeros(0, str),
        return_inverse=True,
        return_counts=True,
    )
    rank = rank_in_group(-drawn, sources.ids, group)
    key = (rank + drawn) / sizes[group] if choice == "stratified" else rank + drawn
    return np.lexsort((sources.ids, key))


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One source row as tokens.

    Attributes
    ----------
    input_ids, labels
        (L,) int64; labels are -100 where the token is not trained.
    """

    id: int
    domain: str
    score: float | None
    input_ids: Ints
    labels: Ints


def single_rows(rows: Iterator[TokenRow], count: int, length: int, shortest: int) -> list[TokenRow]:
    """The first `count` rows of at least `shortest` tokens, each cut at `length`."""
    made: list[TokenRow] = []
    for row in rows:
        if len(made) == count:
            break
        if len(row.input_ids) >= shortest:
            cut = slice(0, length)
            made.append(
                TokenRow(row.id, row.domain, row.score, row.input_ids[cut], row.labels[cut])
            )
    return made


@dataclass(frozen=True, slots=True)
class Window:
    """`length` tokens of one or more rows laid end to end."""

    sources: list[int]
    domain: str
    input_ids: Ints
    labels: Ints


def packed_rows(rows: Iterator[TokenRow], count: int, length: int) -> list[Window]:
    """`count` windows of exactly `length` tokens, rows laid end to end; the rest is left over.

    A row that starts in one window goes on in the next. The window bears the domain of its first
    token.
    """
    made: list[Window] = []
    held: list[TokenRow] = []
    size = 0
    while len(made) < count:
        if size < length:
            row = next(rows, None)
            if row is None:
                break
            if len(row.input_ids):
                held.append(row)
                size += len(row.input_ids)
            continue
        made.append(_window(held, length))
        size -= length
        held = _rest(held, length)
    return made


def _window(held: Sequence[TokenRow], length: int) -> Window:
    ids = np.concatenate([row.input_ids for row in held])[:length]
    labels = np.concatenate([row.labels for row in held])[:length]
    ends = np.cumsum([len(row.input_ids) for row in held])
    used = int(np.searchsorted(ends, length)) + 1
    return Window([row.id for row in held[:used]], held[0].domain, ids, labels)


def _rest(held: list[TokenRow], length: int) -> list[TokenRow]:
    """What is left of the held rows after their first `length` tokens."""
    left: list[TokenRow] = []
    for row in held:
        cut = min(length, len(row.input_ids))
        length -= cut
        if cut < len(row.input_ids):
            left.append(
                TokenRow(row.id, row.domain, row.score, row.input_ids[cut:], row.labels[cut:])
            )
    return left


def in_order(
    sources: Sources, order: Ints, read: Callable[[Ints], Iterator[tuple[Ints, Ints]]], size: int
) -> Iterator[TokenRow]:
    """The rows in the order chosen, read `size` at a time: `read` gives input ids and labels."""
    for start in range(0, len(order), size):
        places = order[start : start + size]
        for place, (input_ids, labels) in zip(places, read(sources.ids[places]), strict=True):
            score = None if sources.score is None else float(sources.score[place])
            yield TokenRow(
                int(sources.ids[place]), str(sources.domains[place]), score, input_ids, labels
            )
