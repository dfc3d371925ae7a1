"""FLAP: heads and neurons whose inputs fluctuate little go, and their mean stays as a bias."""

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
from .group_selection import REASONS, Float64Array, by_id, group_sum, owners


@dataclass(frozen=True, slots=True, kw_only=True)
class Flap:
    """Keep the heads and neurons with the highest weighted fluctuation (FLAP, arXiv:2312.11983).

    Of channel j, an input of the attention output or of the down projection: V_j * ||W_:,j||^2
    (equation 5: what is lost when the channel is replaced by its mean). The metric of attention
    is squared once more, as the published code does. It is z-standardised over the channels of
    each part (layer and half), with the unbiased deviation, and a group scores the mean of its
    channels. All groups of the model compete in one order; the best stay until the parameters
    that go with them reach `keep` of the whole.

    Departures. V_j is the true variance over all tokens (the published code updates it with a
    mean that has been overwritten, sums over tokens and lets the first row count 0). A group is
    the query heads of one key-value head with it, which costs (2 g + 2) * head size * hidden
    parameters; a neuron costs 3 * hidden (2 without a gate); the published cut counts a head of
    128 as 170 neurons and undershoots. A part whose metric is constant scores 0.

    Relations: `wanda_sp` weighs loudness where this weighs fluctuation; `random_groups` and
    `magnitude_groups` are controls. The bias is `compensation.bias_of`.

    Attributes
    ----------
    keep
        Share of the groups' parameters to keep.
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "part", "cost", "channel_offset", "channel_variance", "channel_square"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_of_cost")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(
        self, *, part: IntArray, offset: IntArray, variance: FloatArray, square: FloatArray
    ) -> FloatArray:
        """Standardised fluctuation of each group, (N,) float32.

        `part` (N,) as the signal; `offset` (N+1,) borders of the groups' channels; `variance`
        and `square` of the channels.
        """
        owner = owners(offset)
        where = part[owner]
        metric = variance.astype(np.float64) * square.astype(np.float64)
        metric = np.where(where % 2 == 0, metric**2, metric)
        size = np.maximum(np.diff(offset), 1)
        return (group_sum(_standard(metric, where), offset) / size).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N groups; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs)
        rows, place = by_id(signals)
        score = self.importance(
            part=rows["part"],
            offset=rows["channel_offset"],
            variance=rows["channel_variance"],
            square=rows["channel_square"],
        )[place]
        keep = rules.top_cost(score, signals["id"], signals["cost"], self.keep)
        border = score[keep].min() if keep.any() else np.nan
        held = np.full(signals.n, border, np.float32)
        return Selection(keep, score, (~keep).astype(np.uint8), REASONS, held)


def _standard(values: Float64Array, part: IntArray) -> Float64Array:
    """z-scores within each part; 0 where a part is constant or has one channel."""
    if not len(values):
        return values
    _, inverse, sizes = np.unique(part, return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, weights=values) / sizes
    centred = values - mean[inverse]
    spread = np.bincount(inverse, weights=centred**2) / np.maximum(sizes - 1, 1)
    deviation = np.sqrt(spread)
    # Rounding leaves a constant part a deviation of some last bits.
    real = deviation > 1e-12 * np.abs(mean)
    safe = np.where(real, deviation, 1.0)[inverse]
    return np.asarray(np.where(real[inverse], centred / safe, 0.0), np.float64)
