"""Near-duplicates by cosine: a row goes when an earlier row says almost the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicate:
    """Drop a row whose cosine to a row with a smaller id reaches 1 - `distance`.

    score = 1 - max over earlier rows of cosine(row, earlier); kept where score > distance
    (SemDeDup's rule, Abbas et al. 2023, arXiv:2303.09540, section 3, with the order given by
    row id in place of the distance to a cluster centre, and over all pairs in place of the
    pairs of one cluster). A dropped row still shadows later ones, as published: that makes the
    rule monotone in `distance`, and means the last of a chain a~b~c goes even where a and c
    are further apart than `distance`.

    Exact over all pairs: O(N^2 d) time, O(N) memory besides the vectors.

    Attributes
    ----------
    distance
        Cosine distance within which two rows count as duplicates, 0 to 1. Rows exactly at it
        are dropped; higher drops more.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "embedding"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("distance", "threshold")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    distance: float = 0.05

    def __post_init__(self) -> None:
        check_fraction("distance", self.distance)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; `rival` is the kept row at the head of a dropped row's chain."""
        signals.require(self.needs)
        ids = signals["id"]
        similarity, neighbour = rules.earlier_neighbour(signals["embedding"], ids)
        # float32 unit vectors miss 1 by a few ulps: an exact copy must score exactly 0.
        score = np.maximum(np.float32(1.0) - similarity, np.float32(0.0))
        score[score < 1e-6] = 0.0
        keep = rules.above(score, self.distance)
        rival = np.full(len(ids), -1, np.int64)
        for row in np.argsort(ids, kind="stable"):
            if not keep[row]:
                near = neighbour[row]
                rival[row] = near if keep[near] else rival[near]
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("distinct", "near_duplicate"),
            np.full(len(ids), self.distance, np.float32),
            rival,
        )
