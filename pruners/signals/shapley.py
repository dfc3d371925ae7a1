"""KNN-Shapley: what each training row adds to a k-nearest-neighbour classifier."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..contract import BoolArray, IntArray

Float64Array = npt.NDArray[np.float64]


def knn_shapley(
    neighbours: IntArray,
    agree: BoolArray,
    k: int,
    n: int,
    *,
    candidates: int | None = None,
    beyond: npt.NDArray[np.floating] | None = None,
) -> Float64Array:
    """Shapley value of each of n training rows, mean over Q validation rows, (n,) float64.

    The utility of a set of training rows, for one validation row, is the number of its k
    nearest rows in the set that have the right label, over k; for all, the mean. Higher is
    better; the values of all rows add up to the utility of the whole set where they are exact.

    The recursion from the furthest row inwards is that of Jia et al. 2019 (arXiv:1908.08619,
    theorem 1): s_i = s_{i+1} + (a_i - a_{i+1}) min(k, i) / (i k), with a_i = 1 where the i-th
    nearest has the right label. With all rows given (K* = `candidates`) it starts from
    s_N = a_N min(k, N) / (N k) and is exact; that covers k > N, which the paper leaves out.
    With fewer it is the truncated form of their theorem 2: the last row given and all beyond
    count 0, and no value is off by more than 1 / K*. The library cleanlab computes the
    truncated form with K* = k, and reports (1 + value) / 2.

    That form gives rows in a neighbourhood of one label 0, as if nobody had looked at them.
    `beyond` mends it, our own departure: unrolled, s_K* = a_K* / K* - sum over i > K* of
    a_i / (i (i - 1)), and with a_i replaced by the share of right labels among the rows not
    given, s_K* = a_K* / K* - beyond (1 / K* - 1 / N). The bound of 1 / K* still holds.

    Adds up in float64, O(Q K*) time and memory; call it for blocks of validation rows and add
    the results weighted by their sizes where Q is large.

    Parameters
    ----------
    neighbours
        (Q, K*) int64, positions of the nearest training rows, nearest first, each once.
    agree
        (Q, K*) bool, whether that row's label is the validation row's.
    k
        Neighbours of the classifier, at least 1.
    n
        Number of training rows.
    candidates
        Training rows that a validation row may find; n by default, n - 1 where training rows
        are valued by one another and none finds itself.
    beyond
        (Q,) in [0, 1], the share of right labels among the candidates that are not given;
        None for the published truncated form. Plays no part where all are given.

    Raises
    ------
    InputError
        Shapes differ, a position is outside [0, n), a share is outside [0, 1], or K* is below
        min(k, candidates).
    """
    neighbours, agree = np.asarray(neighbours), np.asarray(agree)
    candidates = n if candidates is None else candidates
    _check(neighbours, agree, k, n, candidates)
    asked, depth = neighbours.shape
    if not asked or not depth:
        return np.zeros(n)
    place = np.arange(1, depth + 1)
    factor = np.minimum(k, place) / (place * k)
    right = agree.astype(np.float64)
    value = np.empty((asked, depth))
    value[:, -1] = 0.0
    if depth == candidates:
        value[:, -1] = right[:, -1] * factor[-1]
    elif beyond is not None:
        value[:, -1] = right[:, -1] / depth - _shares(beyond, asked) * (1 / depth - 1 / candidates)
    value[:, :-1] = (right[:, :-1] - right[:, 1:]) * factor[:-1]
    value = value[:, ::-1].cumsum(axis=1)[:, ::-1]
    total = np.bincount(neighbours.ravel(), weights=value.ravel(), minlength=n)
    return np.asarray(total / asked, np.float64)


def _check(neighbours: IntArray, agree: BoolArray, k: int, n: int, candidates: int) -> None:
    if neighbours.ndim != 2 or neighbours.shape != agree.shape:
        raise InputError(
            f"`neighbours` and `agree` must both be (Q, K*); found {neighbours.shape} and"
            f" {agree.shape}."
        )
    if k < 1:
        raise InputError(f"`k` must be at least 1; found {k}.")
    depth = neighbours.shape[1]
    if not min(k, candidates) <= depth <= candidates <= n:
        raise InputError(
            f"K* must lie between min(k, candidates) and candidates; found K* {depth}, k {k},"
            f" {candidates} candidates among {n} rows. Search deeper, or lower k."
        )
    if neighbours.size and not 0 <= int(neighbours.min()) <= int(neighbours.max()) < n:
        raise InputError(
            f"`neighbours` must be positions in 0..{n - 1}; found {int(neighbours.min())} to"
            f" {int(neighbours.max())}. Leave out rows that were not found."
        )


def _shares(beyond: npt.NDArray[np.floating], asked: int) -> Float64Array:
    shares = np.asarray(beyond, np.float64)
    if shares.shape != (asked,) or not ((shares >= 0) & (shares <= 1)).all():
        raise InputError(
            f"`beyond` must hold a share from 0 to 1 for each of {asked} validation rows; found"
            f" shape {shares.shape}."
        )
    return shares
