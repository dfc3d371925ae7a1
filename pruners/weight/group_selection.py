"""What the methods over groups share: sums within groups and parts, and the choice per part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import rules
from ..contract import FloatArray, IntArray, Selection, Signals

Float64Array = npt.NDArray[np.float64]
REASONS = ("important", "unimportant")


def by_id(signals: Signals) -> tuple[Signals, IntArray]:
    """The rows in the order of their ids, and the place of each row among them, (N,).

    Sums are then taken in one order, whatever the order of the rows.
    """
    order = np.argsort(signals["id"], kind="stable")
    place = np.empty(signals.n, np.int64)
    place[order] = np.arange(signals.n)
    return signals.take(order), place


def owners(offset: IntArray) -> IntArray:
    """The group of each value between the borders (N+1,), (nnz,)."""
    return np.repeat(np.arange(len(offset) - 1), np.diff(offset))


def group_sum(values: npt.NDArray[np.floating], offset: IntArray) -> Float64Array:
    """Sum of each group's values (nnz,), (N,) float64; 0 for a group without any."""
    n = len(offset) - 1
    made = np.bincount(owners(offset), weights=values.astype(np.float64), minlength=n)
    return np.asarray(made, np.float64)


def share_of_part(values: npt.NDArray[np.floating], part: IntArray) -> Float64Array:
    """Each value (N,) over the sum of its part's values; 0 where that sum is 0."""
    _, inverse = np.unique(part, return_inverse=True)
    whole = np.bincount(inverse, weights=values.astype(np.float64))[inverse] if len(part) else part
    made: Float64Array = np.zeros(len(part), np.float64)
    np.divide(values, whole, out=made, where=whole > 0)
    return made


def keep_of_parts(
    signals: Signals, score: npt.NDArray[np.floating], keep: float, reasons: tuple[str, str]
) -> Selection:
    """Keep exactly ceil(keep * size) groups of every part, ties to the smaller id."""
    # Cast before ranking: what is stored must be what was compared.
    stored: FloatArray = score.astype(np.float32)
    mask = rules.top_fraction_by_group(stored, signals["id"], signals["part"], keep)
    return Selection(mask, stored, (~mask).astype(np.uint8), reasons)
