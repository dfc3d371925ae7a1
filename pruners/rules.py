"""How a score becomes a mask. Every rule breaks ties towards the smaller id.

All of them take `score` (N,) higher = kept longer and `ids` (N,) int64, and return masks (N,)
bool. None shortens or reorders an array.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from .contract import BoolArray, FloatArray, IntArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seed: int, ids: IntArray) -> npt.NDArray[np.float64]:
    """Draw for each row a uniform number in (0, 1) from (seed, id) alone, (N,) float64.

    Two rounds of the SplitMix64 finaliser, so that row order, shards and engine do not
    matter (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    with np.errstate(over="ignore"):
        state = mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
        bits = mix(mix(ids.astype(np.uint64) + _GOLDEN) ^ state)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def mix(z: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """The SplitMix64 finaliser: a bijection of 64-bit numbers that scatters near ones."""
    z = np.asarray(z, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def count_of(n: int, fraction: float) -> int:
    """ceil(fraction * n), immune to the last bit of a float: 0.07 of 100 rows is 7 rows."""
    return min(n, math.ceil(round(fraction * n, 9)))


def floor_of(n: int, fraction: float) -> int:
    """floor(fraction * n), as immune: 0.29 of 100 rows is 29 rows."""
    return min(n, math.floor(round(fraction * n, 9)))


def counts_of(
    sizes: IntArray, fraction: float, *, rounded: Literal["up", "down"] = "up"
) -> IntArray:
    """`count_of` ("up") or `floor_of` ("down") for the sizes (G,) of many groups, (G,) int64."""
    count = count_of if rounded == "up" else floor_of
    different, inverse = np.unique(sizes, return_inverse=True)
    return np.array([count(int(size), fraction) for size in different], np.int64)[inverse]


def left_places(values: npt.NDArray[np.floating]) -> IntArray:
    """Number of smaller values in the array, (N,) int64: equal values share a place."""
    return np.searchsorted(np.sort(values), values).astype(np.int64)


def mean_rank(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Mean place of each value among equal ones, over N - 1: 0 lowest, 1 highest, (N,).

    0.5 for a single value.
    """
    if len(values) < 2:
        return np.full(len(values), 0.5)
    last = len(values) - 1
    right = last - left_places(-values)
    return np.asarray((left_places(values) + right) / (2 * last), np.float64)


def best_first(score: npt.NDArray[np.floating], ids: IntArray) -> IntArray:
    """Positions from the highest score to the lowest, ties by smaller id. (N,) int64."""
    return np.lexsort((ids, -score.astype(np.float64))).astype(np.int64)


def top_count(
    score: npt.NDArray[np.floating], ids: IntArray, count: int
) -> tuple[BoolArray, float]:
    """Keep exactly min(count, N) rows; also the lowest kept score (NaN where none is kept)."""
    n = len(score)
    keep = np.zeros(n, np.bool_)
    count = min(count, n)
    if count <= 0:
        return keep, math.nan
    if count < n:
        # Partition first: sorting matters only among rows at the border score.
        border = np.partition(score, n - count)[n - count]
        keep = score > border
        tied = np.flatnonzero(score == border)
        tied = tied[np.argsort(ids[tied], kind="stable")]
        keep[tied[: count - int(keep.sum())]] = True
        return keep, float(border)
    keep[:] = True
    return keep, float(score.min())


def top_fraction(
    score: npt.NDArray[np.floating], ids: IntArray, fraction: float
) -> tuple[BoolArray, float]:
    """Keep exactly ceil(fraction * N) rows; also the lowest kept score."""
    return top_count(score, ids, count_of(len(score), fraction))


def rank_in_group(
    score: npt.NDArray[np.floating],
    ids: IntArray,
    group: IntArray,
    *,
    first: BoolArray | None = None,
) -> IntArray:
    """Place of each row among the rows of its group, 0 = best, ties by smaller id. (N,).

    Rows flagged in `first` (N,) come before the others of their group.
    """
    n = len(score)
    rank = np.zeros(n, np.int64)
    if n == 0:
        return rank
    best = (ids, -score.astype(np.float64))
    order = np.lexsort((*best, group) if first is None else (*best, ~first, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=group[order][0] - 1))
    sizes = np.diff(np.append(starts, n))
    rank[order] = np.arange(n) - np.repeat(starts, sizes)
    return rank


def top_count_by_group(
    score: npt.NDArray[np.floating], ids: IntArray, group: IntArray, count: int
) -> BoolArray:
    """Keep the best `count` rows of every group."""
    return rank_in_group(score, ids, group) < count


def top_fraction_by_group(
    score: npt.NDArray[np.floating], ids: IntArray, group: IntArray, fraction: float
) -> BoolArray:
    """Keep exactly ceil(fraction * size) rows of every group."""
    if len(score) == 0:
        return np.zeros(0, np.bool_)
    _, inverse, sizes = np.unique(group, return_inverse=True, return_counts=True)
    quota = counts_of(sizes, fraction)
    return np.asarray(rank_in_group(score, ids, group) < quota[inverse], np.bool_)


def above(score: npt.NDArray[np.floating], threshold: float) -> BoolArray:
    """Keep rows whose score is strictly above the threshold, compared in float32."""
    return np.asarray(score.astype(np.float32) > np.float32(threshold), np.bool_)


def top_cost(
    score: npt.NDArray[np.floating], ids: IntArray, cost: IntArray, fraction: float
) -> BoolArray:
    """Keep the best rows until their summed cost (N,) reaches `fraction` of the whole.

    The last row that is taken may cross the border: what is kept costs less than one row more
    than asked, never less than asked. With equal costs this is `top_fraction`.
    """
    keep = np.zeros(len(score), np.bool_)
    wanted = count_of(int(cost.sum()), fraction)
    order = best_first(score, ids)
    before = np.cumsum(cost[order]) - cost[order]
    keep[order] = before < wanted
    return keep


def within_cost(
    score: npt.NDArray[np.floating],
    ids: IntArray,
    cost: IntArray,
    limit: int,
    *,
    eligible: BoolArray | None = None,
) -> BoolArray:
    """Keep the best rows whose summed cost stays within `limit`: greedy by score.

    A row that does not fit is passed over and cheaper ones after it may still enter, so the
    limit is never overrun and the room is used. Rows outside `eligible` cost nothing and are
    not kept.
    """
    keep = np.zeros(len(score), np.bool_)
    left = limit
    for row in best_first(score, ids):
        if (eligible is None or eligible[row]) and cost[row] <= left:
            keep[row] = True
            left -= int(cost[row])
    return keep


def earlier_neighbour(
    vectors: FloatArray, ids: IntArray, *, block: int = 1024
) -> tuple[FloatArray, IntArray]:
    """For each row, the highest cosine to any row with a smaller id, and that row's position.

    `vectors` (N, d) float32 unit rows. Returns similarity (N,) float32 (-1 for the first row)
    and position (N,) int64 (-1 for the first row; among equals the smallest id). Exact:
    N*N*d/2 multiply-adds, in blocks of `block` rows, so memory is block * N floats.
    """
    n = len(ids)
    best = np.full(n, -1.0, np.float32)
    where = np.full(n, -1, np.int64)
    order = np.argsort(ids, kind="stable")
    sorted_vectors = np.ascontiguousarray(vectors[order])
    for start in range(0, n, block):
        stop = min(start + block, n)
        similarity = sorted_vectors[start:stop] @ sorted_vectors[:stop].T
        later = np.arange(stop)[None, :] >= np.arange(start, stop)[:, None]
        similarity[later] = -np.inf
        column = similarity.argmax(axis=1)  # the first maximum has the smallest id
        value = similarity[np.arange(stop - start), column]
        rows = order[start:stop]
        found = np.isfinite(value)
        best[rows[found]] = np.clip(value[found], -1.0, 1.0)
        where[rows[found]] = order[column[found]]
    return best, where
