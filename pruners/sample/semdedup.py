"""SemDeDup: near-duplicates by cosine, sought inside clusters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import numpy as np

from .. import rules
from ..contract import (
    BoolArray,
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_fraction,
)

Mode = Literal["published", "greedy"]

# Rows compared at once; a tile of similarities takes 4 * _BLOCK^2 bytes.
_BLOCK = 1024
# float32 unit vectors miss a cosine of 1 by a few ulps: an exact copy must score exactly 0.
_SAME = np.float32(1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class SemDeDup:
    """Drop a row whose cosine to an earlier row of its cluster reaches 1 - `distance`.

    Rows of a cluster come in the order of their distance to its centre, the furthest first,
    ties by smaller id. score = 1 - max cosine to an earlier row, 2 for the first; kept where
    score > distance (Abbas et al. 2023, arXiv:2303.09540, section 3).

    "published" compares with all earlier rows, dropped ones included: one comparison serves
    every `distance` and a larger one keeps a subset, but a chain of rows that are close by
    pairs shrinks to its first. "greedy" compares with kept rows alone: no kept row is within
    `distance` of another of its cluster and each dropped row is within it of a kept one, but
    the kept rows for two values of `distance` need not be nested.

    `near_duplicate` is the published rule over all pairs of the table in the order of ids: it
    finds pairs that clusters part, in N^2 d / 2 multiply-adds where this takes the sum of
    n_c^2 d / 2 over clusters of n_c rows.

    Departures: a row exactly at `distance` is dropped, where the paper keeps it; cosines are
    not spoiled by a zeroed diagonal; `rival` names the kept row that a dropped one lost to,
    which is the head of its chain in "published". Memory is a tile of rows and similarities
    besides O(N), however large a cluster.

    Attributes
    ----------
    distance
        Cosine distance within which two rows count as duplicates, 0 to 1; higher drops more.
    mode
        "published" or "greedy".
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "embedding", "cluster", "centroid_distance"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("distance", "threshold")
    # Rows of other clusters play no part, but clusters run through all parts of a table.
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    distance: float = 0.05
    mode: Mode = "published"

    def __post_init__(self) -> None:
        check_fraction("distance", self.distance)
        check_choice("mode", self.mode, get_args(Mode))

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        n = len(ids)
        vectors, cluster = signals["embedding"], signals["cluster"]
        order = np.lexsort((ids, -signals["centroid_distance"], cluster)).astype(np.int64)
        score = np.full(n, 2.0, np.float32)
        nearest = np.full(n, -1, np.int64)
        search = _all_earlier if self.mode == "published" else _kept_earlier
        for rows in _clusters(order, cluster):
            score[rows], nearest[rows] = search(vectors, rows, self.distance)
        keep = rules.above(score, self.distance)
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("distinct", "near_duplicate"),
            np.full(n, self.distance, np.float32),
            _heads(keep, nearest, order),
        )


def _clusters(order: IntArray, cluster: IntArray) -> Iterator[IntArray]:
    """The rows of each cluster of two or more, in their order."""
    borders = np.flatnonzero(np.diff(cluster[order])) + 1
    for start, stop in pairwise([0, *borders.tolist(), len(order)]):
        if stop - start > 1:
            yield order[start:stop]


def _heads(keep: BoolArray, nearest: IntArray, order: IntArray) -> IntArray:
    """The kept row at the end of each dropped row's chain of nearest ones, (N,), else -1."""
    rival = np.full(len(keep), -1, np.int64)
    for row in order[~keep[order]]:
        near = nearest[row]
        rival[row] = near if keep[near] else rival[near]
    return rival


def _distances(similarity: FloatArray) -> FloatArray:
    away = np.float32(1.0) - np.clip(similarity, -1.0, 1.0)
    away[away < _SAME] = 0.0
    return np.asarray(away, np.float32)


def _nearer(best: FloatArray, where: IntArray, similarity: FloatArray, positions: IntArray) -> None:
    """Take over, in place, the columns of `similarity` (B, C) that are above `best` (B,).

    Among equal ones the earliest column, and the earlier tile, stays.
    """
    column = similarity.argmax(axis=1)
    value = similarity[np.arange(len(best)), column]
    higher = value > best
    best[higher] = value[higher]
    where[higher] = positions[column[higher]]


def _all_earlier(
    vectors: FloatArray, rows: IntArray, distance: float
) -> tuple[FloatArray, IntArray]:
    """Distance of each row to the nearest before it, and which that is, two (C,)."""
    score = np.empty(len(rows), np.float32)
    nearest = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        mine = rows[start : start + _BLOCK]
        block = vectors[mine]
        best = np.full(len(mine), -np.inf, np.float32)
        where = np.full(len(mine), -1, np.int64)
        for first in range(0, start, _BLOCK):
            others = rows[first : first + _BLOCK]
            _nearer(best, where, block @ vectors[others].T, others)
        inside = block @ block.T
        inside[~np.tri(len(mine), k=-1, dtype=np.bool_)] = -np.inf
        _nearer(best, where, inside, mine)
        score[start : start + _BLOCK] = _distances(best)
        nearest[start : start + _BLOCK] = where
    return score, nearest


def _kept_earlier(
    vectors: FloatArray, rows: IntArray, distance: float
) -> tuple[FloatArray, IntArray]:
    """The same against rows that are further than `distance` from all kept before them."""
    score = np.empty(len(rows), np.float32)
    nearest = np.empty(len(rows), np.int64)
    kept = np.zeros(0, np.int64)
    limit = np.float32(distance)
    for start in range(0, len(rows), _BLOCK):
        mine = rows[start : start + _BLOCK]
        block = vectors[mine]
        best = np.full(len(mine), -np.inf, np.float32)
        where = np.full(len(mine), -1, np.int64)
        for first in range(0, len(kept), _BLOCK):
            others = kept[first : first + _BLOCK]
            _nearer(best, where, block @ vectors[others].T, others)
        away, inside = _distances(best), _distances(block @ block.T)
        taken = []
        for i in range(len(mine)):
            if away[i] > limit:
                taken.append(i)
                closer = np.flatnonzero(inside[i, i + 1 :] < away[i + 1 :]) + i + 1
                away[closer], where[closer] = inside[i, closer], mine[i]
        kept = np.concatenate([kept, mine[taken]])
        score[start : start + _BLOCK], nearest[start : start + _BLOCK] = away, where
    return score, nearest
