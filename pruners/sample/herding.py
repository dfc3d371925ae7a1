"""Herding: rows whose mean stays at the mean of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_fraction,
)
from .best import keep_best

Doubles = npt.NDArray[np.float64]

_BLOCK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Herding:
    """Keep rows whose mean embedding matches the mean of all (Welling 2009).

    With m the mean of all rows and S the sum of the t rows picked so far, the next pick is the
    row x with the least |(t + 1) m - S - x|, ties to the smaller id. A row is picked once. (Max
    Welling, "Herding dynamical weights to learn", ICML 2009, in the form of Rebuffi et al.,
    arXiv:1611.07725, algorithm 4.) DeepCore's herding takes the greatest in place of the least
    and matches the mean worse than chance does.

    score = minus the row's place among the picks, 0 for the first; rows that were not picked
    share the place after the last. A larger `keep` goes on where a smaller one stopped. The
    mean is that of all rows, not of each class; put strata around it for that.

    ceil(keep * N) * N * d multiply-adds; O(N) memory besides the vectors. The matrix product
    of a pick is in float32; rows within its error of the best are compared in float64, so the
    order in which rows come changes nothing.

    Measured (benchmarks/RESULTS.md, MNIST, 20 % wrong labels): level with random rows without
    a teacher, better by 0.1 to 0.3 points with one.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "embedding"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        picks = herd(signals["embedding"], ids, rules.count_of(len(ids), self.keep))
        score = np.full(len(ids), -len(picks), np.float32)
        score[picks] = -np.arange(len(picks), dtype=np.float32)
        return keep_best(signals, score, self.keep, ("matches_mean", "not_needed"))


def herd(vectors: FloatArray, ids: IntArray, count: int) -> IntArray:
    """Positions of the first `count` picks of herding over N rows (N, d), (count,) int64."""
    d = vectors.shape[1]
    picks = np.zeros(count, np.int64)
    if not count:
        return picks
    squares = _squares(vectors)
    half = (squares / 2).astype(np.float32)
    longest = math.sqrt(float(squares.max()))
    mean = _mean(vectors, np.argsort(ids))
    wanted = np.zeros(d)  # (t + 1) m - S: what the picks still lack
    for step in range(count):
        wanted += mean
        # |w - x|^2 = |w|^2 - 2 (w x - |x|^2 / 2): the least distance is the highest bracket.
        gain = vectors @ wanted.astype(np.float32)
        gain -= half
        # float32 products miss by up to 2^-24 of the largest sum, once for each of d terms.
        reach = (np.linalg.norm(wanted) + longest) * longest
        near = np.flatnonzero(gain >= gain.max() - 2 * (d + 4) * 2.0**-24 * reach)
        row = _best(vectors, squares, ids, near, wanted) if len(near) > 1 else int(near[0])
        picks[step], half[row] = row, np.inf  # a row is picked once
        wanted -= vectors[row]
    return picks


def _squares(vectors: FloatArray) -> Doubles:
    made = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK].astype(np.float64)
        made[start : start + _BLOCK] = np.square(block).sum(axis=1)
    return made


def _mean(vectors: FloatArray, order: IntArray) -> Doubles:
    """Mean of all rows, added up in the order of their ids."""
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(order), _BLOCK):
        total += vectors[order[start : start + _BLOCK]].sum(axis=0, dtype=np.float64)
    return np.asarray(total / len(order), np.float64)


def _best(
    vectors: FloatArray, squares: Doubles, ids: IntArray, near: IntArray, wanted: Doubles
) -> int:
    """The row of `near` with the highest gain in float64, ties to the smaller id."""
    gain = np.empty(len(near))
    for start in range(0, len(near), _BLOCK):
        rows = near[start : start + _BLOCK]
        # A product and a sum, not BLAS: equal rows get equal bits wherever they stand.
        product = (vectors[rows] * wanted).sum(axis=1)
        gain[start : start + _BLOCK] = product - squares[rows] / 2
    tied = near[gain == gain.max()]
    return int(tied[ids[tied].argmin()])
