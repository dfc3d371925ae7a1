"""Wanda-sp: Wanda's score summed over the channels of a head or neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

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
from .group_selection import REASONS, by_id, group_sum, keep_of_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class WandaSp:
    """Keep the heads and neurons whose channels are loud and read (Wanda-sp, arXiv:2312.11983).

    score = sum over the group's channels j of ||x_j|| * mean_i |w_ij|, w the attention output or
    down projection; groups of one part (layer and half) are compared. The norm is the root mean
    square, the scale does not matter within a part.

    Departures: the query heads of one key-value head are one group; counts are exact.

    Relations: the structured form of `wanda`; `flap` standardises a fluctuation instead and
    compares over layers.

    Attributes
    ----------
    keep
        Share of each part's groups to keep; exactly ceil(keep * groups).
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "part", "channel_offset", "channel_norm", "channel_mass"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, offset: IntArray, norm: FloatArray, mass: FloatArray) -> FloatArray:
        """Summed score of each group (N,) float32, from its channels' norm and mass."""
        return group_sum(norm.astype(np.float64) * mass, offset).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N groups; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs)
        rows, place = by_id(signals)
        score = self.importance(
            offset=rows["channel_offset"], norm=rows["channel_norm"], mass=rows["channel_mass"]
        )[place]
        return keep_of_parts(signals, score, self.keep, REASONS)
