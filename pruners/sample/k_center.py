"""k-center: rows chosen so that no row is far from a chosen one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .farthest import farthest_first


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

    Exact, whatever the order of rows or the machine: see `farthest_first` for how distances are
    rounded. At most ceil(keep * N) * N * d multiply-adds in matrix products, O(N) memory beside
    the vectors, and one copy of them where the rows do not come in the order of their ids.

    Measured (benchmarks/RESULTS.md, MNIST): better than random rows with clean labels, and
    with 20 % wrong ones where a teacher is listened to; worse there at 10 % without one.

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
        vectors = signals["embedding"]
        if (np.diff(order) < 0).any():
            vectors = vectors[order]
        chosen, distance, nearest = farthest_first(vectors, rules.count_of(n, self.keep))
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
