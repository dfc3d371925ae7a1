"""Moderate coreset: rows neither near to the middle of their class nor far from it."""

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
from ..ragged import Float64Array, by_group

_BLOCK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Moderate:
    """Keep rows whose distance to their class's median is nearest to the usual one (ICLR 2023).

    The centre of a class is the median of its embeddings, feature by feature; a row's distance
    to it is Euclidean. Rows of a class are placed by distance, (rank + 1/2) / size, equal
    distances at the mean of their places, and score = minus the distance of that place from the
    middle, 1/2: in [-1/2, 0], higher is kept. (Xia et al. 2023, "Moderate coreset: a universal
    method of data selection for real-world data-efficient deep learning", section 3.)

    Departures: the authors' script places the rows of all classes together and keeps a window
    of places, which misses the count by rounding and prefers classes of middling spread; here
    places are those inside the class, so classes keep about equal shares, and the count is
    exact. A class of one row has that row in its middle and keeps it first; one of two keeps
    them from `keep` = 1/2 on.

    Measured (benchmarks/RESULTS.md, MNIST): worse than random rows with clean labels; with 20
    % wrong ones better at 10 % without a teacher, and worse or level elsewhere.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "embedding", "label"})
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
        place = places(signals["embedding"], signals["label"], ids)
        score = -np.abs(place - 0.5).astype(np.float32)
        keep, border = rules.top_fraction(score, ids, self.keep)
        reason = np.where(keep, 0, np.where(place < 0.5, 1, 2)).astype(np.uint8)
        return Selection(
            keep,
            score,
            reason,
            ("moderate", "near_class_median", "far_from_class_median"),
            np.full(len(ids), border, np.float32),
        )


def places(vectors: FloatArray, label: IntArray, ids: IntArray) -> Float64Array:
    """Place of each row in its class by distance to the class's median, (N,), inside (0, 1)."""
    run = by_group(label, ids)
    made = np.empty(len(ids))
    for start, size in zip(run.starts, run.sizes, strict=True):
        rows = run.order[start : start + size]
        rank = rules.mean_rank(_distance(vectors, rows)) * (size - 1) if size > 1 else 0.0
        made[rows] = (rank + 0.5) / size
    return made


def _distance(vectors: FloatArray, rows: IntArray) -> Float64Array:
    """Squared Euclidean distance of rows to the median of them all, (C,): it ranks as well."""
    centre = np.median(vectors[rows], axis=0).astype(np.float64)
    parts = [
        np.square(vectors[rows[start : start + _BLOCK]] - centre).sum(axis=1)
        for start in range(0, len(rows), _BLOCK)
    ]
    return np.concatenate(parts)
