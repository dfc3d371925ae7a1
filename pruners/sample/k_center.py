"""k-center: rows chosen so that no row is far from a chosen one."""

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
    check_fraction,
)

# Above any cosine distance, which ends at 2.
_FIRST = np.float32(3.0)
# float32 unit vectors miss a cosine of 1 by a few ulps.
_SAME = np.float32(1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class KCenter:
    """Keep the rows that cover the others, greedily (k-center of a core set, arXiv:1708.00489).

    The row nearest to the mean embedding comes first, then again and again the row that is
    furthest from all chosen ones, ties to the smaller id. score = cosine distance to the rows
    chosen before it, for a chosen row, and to all chosen rows, for any other; 3 for the first.
    Cosine and Euclidean distance rank unit vectors alike. A larger `keep` goes on where a
    smaller one stopped. `rival` of a dropped row is the chosen row nearest to it.

    Departure: the paper starts from rows that are labelled already, and then improves on the
    greedy cover by integer programming; here it is greedy alone. Outliers are taken early: use
    it behind a quality filter.

    Exact, ceil(keep * N) * N * d multiply-adds.

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
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        n = len(ids)
        # In the order of ids: the first of equal distances is then the smallest id.
        order = np.argsort(ids)
        vectors = np.ascontiguousarray(signals["embedding"][order])
        chosen, distance, nearest = cover(vectors, rules.count_of(n, self.keep))
        keep = np.zeros(n, np.bool_)
        keep[order[chosen]] = True
        score = np.zeros(n, np.float32)
        score[order] = distance
        rival = np.full(n, -1, np.int64)
        if len(chosen):
            rival[order] = order[nearest]
        border = score[keep].min() if len(chosen) else np.nan
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("far_from_chosen", "near_chosen"),
            np.full(n, border, np.float32),
            np.where(keep, -1, rival),
        )


def cover(vectors: FloatArray, count: int) -> tuple[IntArray, FloatArray, IntArray]:
    """Choose `count` of N unit rows (N, d), each the furthest from those before it.

    Returns the chosen positions in order (count,), the cosine distance of each row to the
    rows chosen before it (chosen rows) or to all of them (N,) float32, and the chosen row
    nearest to each row (N,) int64.
    """
    n = len(vectors)
    distance = np.full(n, _FIRST, np.float32)
    nearest = np.zeros(n, np.int64)
    chosen = np.zeros(count, np.int64)
    left = np.ones(n, np.bool_)
    for step in range(count):
        if step:
            row = int(np.where(left, distance, -1.0).argmax())
        else:
            row = int((vectors @ vectors.mean(axis=0)).argmax())
        chosen[step], left[row] = row, False
        away = np.maximum(np.float32(1.0) - vectors @ vectors[row], 0.0)
        away[away < _SAME] = 0.0
        closer = left & (away < distance)
        distance[closer], nearest[closer] = away[closer], row
    return chosen, distance, nearest
