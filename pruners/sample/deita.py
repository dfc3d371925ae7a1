"""DEITA: the best rows by complexity times quality, unless they repeat a better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from .. import rules
from ..contract import Budget, FloatArray, IntArray, Scope, Selection, Signals, Unit, check_fraction

REASONS = ("good_and_new", "refilled", "too_near", "low_score")
_NEW, _REFILLED, _NEAR, _LOW = range(len(REASONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deita:
    """Keep good, complex rows that are not near to a better one (DEITA, arXiv:2312.15685).

    Rows are gone through by complexity * quality, highest first; a row whose cosine to an
    accepted one reaches 1 - `distance` is passed over. Accepted rows come first in the final
    order, passed-over ones after them, each by the product: where the table has too few
    distinct rows for the budget it is refilled by the best of those, so that the budget holds
    (the paper stops short). score = 1 - place / N in that order, highest kept; it does not
    depend on the budget. `rival` of a row that went for being too near is the accepted row
    nearest to it, where that one is kept.

    Both scores are given (a rater's, 0 or more: two negative ones would multiply to a high
    product, so they are refused).

    Exact: N * accepted rows * d multiply-adds.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    distance
        Cosine distance within which a row repeats an accepted one, 0 to 1; the paper's 0.1.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "complexity", "quality", "embedding"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.1
    distance: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_fraction("distance", self.distance)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing, not finite or < 0."""
        signals.require(self.needs)
        for name in ("complexity", "quality"):
            _check_not_negative(name, signals[name])
        ids, n = signals["id"], signals.n
        product = signals["complexity"].astype(np.float64) * signals["quality"]
        order = rules.best_first(product, ids)
        vectors = np.ascontiguousarray(signals["embedding"][order])
        over, nearest = passed_over(vectors, self.distance)
        final = order[np.argsort(over, kind="stable")]
        place = np.empty(n, np.int64)
        place[final] = np.arange(n)
        count = rules.count_of(n, self.keep)
        keep = place < count
        near = np.zeros(n, np.bool_)
        near[order] = over
        rival = np.full(n, -1, np.int64)
        rival[order] = np.where(over, order[nearest], -1) if n else rival
        rival = np.where(~keep & (rival >= 0) & keep[rival], rival, -1)
        reason = np.where(
            keep, np.where(near, _REFILLED, _NEW), np.where(rival >= 0, _NEAR, _LOW)
        ).astype(np.uint8)
        score = (1.0 - place / max(n, 1)).astype(np.float32)
        threshold = np.full(n, 1.0 - (count - 1) / max(n, 1), np.float32)
        return Selection(keep, score, reason, REASONS, threshold, rival)


def _check_not_negative(name: str, values: FloatArray) -> None:
    if len(values) and values.min() < 0:
        row = int(values.argmin())
        raise InputError(
            f"signal `{name}` must be 0 or more for a product of two scores; row {row} holds"
            f" {values[row]}. Shift or rescale the scores first."
        )


def passed_over(
    vectors: FloatArray, distance: float, *, block: int = 512
) -> tuple[npt.NDArray[np.bool_], IntArray]:
    """Which unit rows (N, d) repeat an accepted one before them, (N,) bool.

    Also the accepted row nearest to each, among those before it, (N,) int64; 0 where there is
    none. Cosines to the rows accepted so far are taken a block at a time.
    """
    n = len(vectors)
    over = np.zeros(n, np.bool_)
    nearest = np.zeros(n, np.int64)
    accepted = np.zeros(0, np.int64)
    limit = np.float32(1.0 - distance)
    for start in range(0, n, block):
        rows = vectors[start : start + block]
        best = np.full(len(rows), -2.0, np.float32)
        if len(accepted):
            cosine = rows @ vectors[accepted].T
            at = cosine.argmax(axis=1)
            best, nearest[start : start + block] = cosine.max(axis=1), accepted[at]
        inside = rows @ rows.T
        for i in range(len(rows)):
            # An exact copy must be passed over at distance 0, whatever the last bits say.
            over[start + i] = best[i] >= limit - 1e-6
            if not over[start + i]:
                closer = np.flatnonzero(inside[i] > best)
                closer = closer[closer > i]
                best[closer], nearest[start + closer] = inside[i][closer], start + i
        accepted = np.append(accepted, start + np.flatnonzero(~over[start : start + block]))
    return over, nearest
