"""Arithmetic over rows that belong to groups: tokens of samples, sentences of passages.

Sums of floats depend in their last bits on the order of rows, and a tie can hang on that: put
rows into the order of their ids first, so that the order they came in does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contract import IntArray
from .rules import mix

Reals = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]

# Losses are float32 sums over a vocabulary: a range below this, in nats, is rounding and no
# signal, and dividing by it would blow rounding up to the whole scale.
NOISE = 1e-6


def token_ids(sample: IntArray, position: IntArray) -> IntArray:
    """Id of each token from its sample's id and its place in it, (T,) int64, non-negative.

    Ids of one sample ascend with position, so a tie that goes to the smaller id goes to the
    earlier token. Two samples of L tokens get a common id with probability about L / 2**61;
    `Signals` refuses repeated ids, so that is found, never silent.
    """
    with np.errstate(over="ignore"):
        start = mix(sample.astype(np.uint64)) >> np.uint64(2)
    return start.astype(np.int64) + position.astype(np.int64)


def group_mean(
    values: npt.NDArray[np.floating], inverse: IntArray, groups: int
) -> npt.NDArray[np.float64]:
    """Mean of `values` (N,) over each of the groups that `inverse` (N,) numbers, (G,) float64."""
    counts = np.bincount(inverse, minlength=groups)
    sums = np.bincount(inverse, weights=values.astype(np.float64), minlength=groups)
    return np.asarray(sums / np.maximum(counts, 1), np.float64)


def segment_mean(values: Reals, offset: IntArray) -> Float64Array:
    """Mean of each segment values[offset[i]:offset[i + 1]], (S,) float64; 0 for empty ones."""
    sizes = np.diff(offset)
    means = np.zeros(len(sizes))
    filled = np.flatnonzero(sizes)
    if filled.size:
        sums = np.add.reduceat(values.astype(np.float64), offset[filled])
        means[filled] = sums / sizes[filled]
    return means


@dataclass(frozen=True, slots=True)
class Grouped:
    """N rows put into the order of (group, place in it), and the G groups that they form.

    Attributes
    ----------
    order
        (N,) int64, the rows in that order: `values[order]` sorts, `out[order] = x` puts back.
    groups
        (G,) int64, group ids, ascending.
    starts
        (G,) int64, where each group starts in the sorted rows.
    owner
        (N,) int64, number of the group of each sorted row.
    """

    order: IntArray
    groups: IntArray
    starts: IntArray
    owner: IntArray

    @property
    def sizes(self) -> IntArray:
        """(G,) int64, rows of each group."""
        return np.diff(np.append(self.starts, len(self.order)))

    def mean(self, values: Reals) -> Float64Array:
        """Mean of sorted values (N,) over each group, (G,) float64."""
        return group_mean(values, self.owner, len(self.groups))

    def unit_range(self, values: Reals) -> Float64Array:
        """Sorted values (N,) stretched to 0 to 1 inside each group, (N,) float64.

        0.5 throughout a group whose values differ by less than `NOISE`.
        """
        wide = values.astype(np.float64)
        if not len(wide):
            return wide
        low = np.minimum.reduceat(wide, self.starts)
        span = np.maximum.reduceat(wide, self.starts) - low
        flat = span < NOISE
        stretched = (wide - low[self.owner]) / np.where(flat, 1.0, span)[self.owner]
        return np.asarray(np.where(flat[self.owner], 0.5, stretched), np.float64)


def by_group(group: IntArray, place: IntArray) -> Grouped:
    """Sort rows by group and, inside it, by place: both (N,) int64, in any order."""
    order = np.lexsort((place, group)).astype(np.int64)
    groups, starts, owner = np.unique(group[order], return_index=True, return_inverse=True)
    return Grouped(order, groups, starts.astype(np.int64), owner.astype(np.int64))


def neighbours(
    values: Float64Array, run: Grouped, turn: IntArray, position: IntArray, *, outside: float
) -> tuple[Float64Array, Float64Array]:
    """Value of the row before and of the row after each sorted row, two (N,) float64.

    A neighbour is the adjacent position (it differs by exactly 1) of the same group and turn;
    `outside` stands where there is none. `turn` and `position` (N,) are sorted like `values`.
    """
    before = np.full(len(values), outside)
    after = before.copy()
    joined = (np.diff(run.owner) == 0) & (np.diff(turn) == 0) & (np.diff(position) == 1)
    before[1:][joined] = values[:-1][joined]
    after[:-1][joined] = values[1:][joined]
    return before, after
