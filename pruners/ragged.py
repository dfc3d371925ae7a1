"""Arithmetic over rows that belong to groups: tokens of samples, sentences of passages.

Sums of floats depend in their last bits on the order of rows, and a tie can hang on that: put
rows into the order of their ids first, so that the order they came in does not matter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .contract import IntArray
from .rules import mix


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
