"""Q-Tuning's plane of error and uncertainty: which samples are worth training on.

Places are counted from the left: the place of a value is the number of smaller values in its
pool, 0 to n - 1, so equal values share a place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import rules
from ..contract import BoolArray, IntArray
from ..ragged import NOISE, Float64Array

Normalise = Literal["minmax", "rank", "log"]
Search = Literal["exact", "published"]

NOISY, MISCONCEPTION, REDUNDANT, CALIBRATION = 1, 2, 3, 4
# In hundredths of the pool: the loosest threshold of the published search.
LOOSEST = 49
_ITERATIONS = 10
_CLOSE_ENOUGH = 0.01


@dataclass(frozen=True, slots=True)
class Plane:
    """S samples on the plane, in the order of their ids.

    Attributes
    ----------
    sample
        (S,) int64, ids, ascending.
    error
        (S,) float64, mean loss of the trainable tokens in nats: the log of the perplexity.
    uncertainty
        (S,) float64, mean entropy of the trainable tokens in nats.
    quadrant
        (S,) uint8: 1 noise (both high), 2 misconception (error high, uncertainty low), 3
        redundant (both low), 4 calibration (error low, uncertainty high). A sample that the
        search can reach, or that topped the selection up, is 2 or 4, which says how its tokens
        are treated; every other one is 1 or 3, by the sum of its mean places on both axes.
    score
        (S,) float64 in 0 to 1, higher = kept longer; what the samples were ranked by.
    kept
        (S,) bool.
    topped_up
        (S,) bool, kept by the supplement score, beyond what the thresholds reach.
    correlation
        Pearson's correlation of error and uncertainty; NaN where one of them is constant.
    topped_up_share
        Share of the kept samples that topped up; 0 where none is kept.
    """

    sample: IntArray
    error: Float64Array
    uncertainty: Float64Array
    quadrant: npt.NDArray[np.uint8]
    score: Float64Array
    kept: BoolArray
    topped_up: BoolArray
    correlation: float
    topped_up_share: float


class Verdict(NamedTuple):
    """What was decided for n samples: (n,) arrays as in `Plane`."""

    quadrant: npt.NDArray[np.uint8]
    score: Float64Array
    kept: BoolArray
    topped_up: BoolArray


def decide(
    error: Float64Array,
    uncertainty: Float64Array,
    ids: IntArray,
    *,
    share: float,
    normalise: Normalise,
    search: Search,
) -> Verdict:
    """Choose among the n samples of one pool; all arrays (n,), ties to the smaller id."""
    step, second = reach(error, uncertainty)
    last = max(len(ids) - 1, 1)
    corner = 100 * step <= LOOSEST * (len(ids) - 1) if len(ids) > 1 else np.zeros(1, np.bool_)
    x, y = normalised(error, uncertainty, normalise)
    supplement = np.abs(x - y)
    score = np.where(corner, 1.0 - step / (2 * last), supplement / 2)
    if search == "exact":
        inside = corner
        kept, _ = rules.top_count(score, ids, rules.count_of(len(ids), share))
    else:
        inside = published_search(error, uncertainty, share)
        missing = max(1, round(round(share * len(ids), 9))) - int(inside.sum())
        more, _ = rules.top_count(np.where(inside, -1.0, supplement), ids, missing)
        kept = inside | more
    topped_up = kept & ~inside
    # By ranks: on a min-max axis one outlier would push every other sample to the same side.
    quadrant = np.where(
        rules.mean_rank(error) + rules.mean_rank(uncertainty) >= 1.0, NOISY, REDUNDANT
    )
    quadrant = np.where(corner, np.where(second, MISCONCEPTION, CALIBRATION), quadrant)
    quadrant = np.where(topped_up, np.where(x >= y, MISCONCEPTION, CALIBRATION), quadrant)
    return Verdict(quadrant.astype(np.uint8), score, kept, topped_up)


def reach(error: Float64Array, uncertainty: Float64Array) -> tuple[IntArray, BoolArray]:
    """How far the thresholds must open until each sample enters, and whether as quadrant 2.

    With thresholds at the alpha and 1 - alpha quantiles (linear between places), a sample
    enters quadrant 2 once alpha exceeds 1 - place(error) / (n - 1) and reaches
    place(uncertainty) / (n - 1); quadrant 4 the other way round. Returns the smaller of the
    two in places, alpha * (n - 1), (n,) int64, and (n,) bool.
    """
    last = len(error) - 1
    high, surely = rules.left_places(error), rules.left_places(uncertainty)
    second = np.maximum(last - high, surely)
    fourth = np.maximum(high, last - surely)
    return np.minimum(second, fourth), np.asarray(second < fourth, np.bool_)


def published_search(error: Float64Array, uncertainty: Float64Array, share: float) -> BoolArray:
    """Samples in quadrant 2 or 4 when the bisection of Algorithm 1 stops, (n,) bool.

    Quantiles of the error are the same in logs up to the interpolation between two places,
    which never moves a sample across.
    """
    low, high = 0.0, LOOSEST / 100
    inside = np.zeros(len(error), np.bool_)
    for _ in range(_ITERATIONS):
        alpha = (low + high) / 2
        error_low, error_high = np.quantile(error, [alpha, 1 - alpha])
        sure, unsure = np.quantile(uncertainty, [alpha, 1 - alpha])
        second = (error > error_high) & (uncertainty <= sure)
        fourth = (error <= error_low) & (uncertainty > unsure)
        inside = second | fourth
        found = float(inside.mean())
        if abs(found - share) < _CLOSE_ENOUGH:
            break
        if found < share:
            low = alpha
        else:
            high = alpha
    return inside


def normalised(
    error: Float64Array, uncertainty: Float64Array, how: Normalise
) -> tuple[Float64Array, Float64Array]:
    """Both axes on 0 to 1, two (n,) float64; a constant axis is 0.5 throughout.

    "minmax": perplexity, exp(error), and uncertainty by their ranges, as published; one
    outlier squeezes the others together. "log": the same with error itself. "rank": mean
    places divided by n - 1.
    """
    if how == "rank":
        return rules.mean_rank(error), rules.mean_rank(uncertainty)
    if how == "log":
        return _unit_range(error), _unit_range(uncertainty)
    low, high = error.min(), error.max()
    if high - low < NOISE:
        return np.full(len(error), 0.5), _unit_range(uncertainty)
    # (exp(e) - exp(low)) / (exp(high) - exp(low)), without an overflow.
    perplexity = (np.exp(error - high) - np.exp(low - high)) / -np.expm1(low - high)
    return perplexity, _unit_range(uncertainty)


def _unit_range(values: Float64Array) -> Float64Array:
    span = values.max() - values.min()
    if span < NOISE:
        return np.full(len(values), 0.5)
    return np.asarray((values - values.min()) / span, np.float64)


def correlation(error: Float64Array, uncertainty: Float64Array) -> float:
    """Pearson's correlation; NaN where one of the axes is constant or there are no two rows."""
    if len(error) < 2 or min(np.ptp(error), np.ptp(uncertainty)) < NOISE:
        return math.nan
    return float(np.corrcoef(error, uncertainty)[0, 1])


def pools(ids: IntArray, size: int | None, seed: int) -> IntArray:
    """Number of each sample's pool, (S,) int64: at most `size` samples each, drawn evenly.

    Samples are put in the order of a number drawn from (seed, id) and cut into the fewest
    pools that will do, of sizes that differ by one at most. None: one pool.
    """
    if size is None:
        return np.zeros(len(ids), np.int64)
    count = math.ceil(len(ids) / size)
    place = rules.rank_in_group(rules.uniform(seed, ids), ids, np.zeros(len(ids), np.int64))
    return np.asarray(place * count // max(len(ids), 1), np.int64)
