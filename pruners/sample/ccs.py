"""CCS: the hardest rows cut, and equal shares of every stratum of difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_count,
    check_fraction,
)
from .difficulty import hardest, keep_uncut_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Ccs:
    """Keep equal shares of strata of difficulty, the hardest rows cut (CCS, arXiv:2210.15809).

    The floor(cutoff * N) hardest rows, by the signal `difficulty`, are cut. The range of
    difficulty of the others is divided into `strata` of equal width. Budget goes to strata from
    the smallest up: each gets an equal share of what is left, so small ones are kept whole.
    Inside a stratum rows are drawn.

    score = minus the row's place in the draw of its stratum, from (seed, id); highest kept, cut
    rows after all others and easiest first. That gives the published shares, to one row a
    stratum: the rows of the last, part-filled place go by smaller id. A larger `keep` keeps a
    superset, and exactly ceil(keep * N) rows are kept whatever the scores: constant or negative
    ones lose no row.

    Relations: for balanced classes apply it in each class (`pruners.strata.stratified`).

    Measured (benchmarks/RESULTS.md, MNIST, difficulty by AUM): with 20 % wrong labels better
    than random rows from 30 % on; with clean labels worse than random at every fraction.

    Attributes
    ----------
    keep
        Fraction of rows to keep, of all N; exactly ceil(keep * N).
    cutoff
        Fraction of the hardest rows to cut first. The paper tunes it to the budget, from 0 for
        large ones to 0.3 where 10 % is kept; more where labels are noisy.
    strata
        Number of strata.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "difficulty"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    cutoff: float = 0.1
    strata: int = 50

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_fraction("cutoff", self.cutoff)
        check_count("strata", self.strata, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        difficulty = signals["difficulty"]
        cut = hardest(difficulty, ids, self.cutoff)
        left = np.flatnonzero(~cut)
        place = np.zeros(len(ids), np.int64)
        place[left] = rules.rank_in_group(
            rules.uniform(seed, ids[left]), ids[left], strata_of(difficulty[left], self.strata)
        )
        return keep_uncut_first(signals, place, cut, self.keep)


def strata_of(difficulty: FloatArray, strata: int) -> IntArray:
    """Number of the stratum of each row, (N,) int64, 0 the easiest; all 0 where all are equal.

    Strata are equally wide from the lowest to the highest difficulty (N,), float64 inside.
    """
    if not len(difficulty):
        return np.zeros(0, np.int64)
    wide = difficulty.astype(np.float64)
    low = wide.min()
    span = wide.max() - low
    if span == 0:
        return np.zeros(len(wide), np.int64)
    number = np.minimum((wide - low) / span * strata, strata - 1)
    return np.asarray(number.astype(np.int64), np.int64)
