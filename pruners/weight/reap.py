"""REAP: experts by the mean length of what they add, over the tokens that reach them."""

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
from .group_selection import REASONS, keep_of_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Reap:
    """Keep the experts that add most to a token that they get (REAP, arXiv:2510.13999).

    score = mean over the tokens routed to the expert of g * ||E(x)||, g the gate; without the
    gate (`gated` false) the mean length of its output, which arXiv:2606.15716 reports as better
    where the compressed model is for no task in particular. Experts of one layer are compared;
    one that got no token scores 0.

    Departures: none of formula; counts are exact.

    Relations: `easy_ep` sums over tokens and weighs how far they were turned;
    `expert_frequency` counts them; `random_experts` is the control.

    Attributes
    ----------
    keep
        Share of each layer's experts to keep; exactly ceil(keep * experts).
    gated
        Weigh each output by its gate.
    """

    unit: ClassVar[Unit] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "part", "expert_tokens", "expert_reap", "expert_norm"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5
    gated: bool = True

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, tokens: IntArray, reap: FloatArray, norm: FloatArray) -> FloatArray:
        """Mean over its tokens of each expert (N,) float32, from sums over them."""
        total = reap if self.gated else norm
        return np.where(tokens > 0, total / np.maximum(tokens, 1), 0.0).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N experts; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs)
        score = self.importance(
            tokens=signals["expert_tokens"],
            reap=signals["expert_reap"],
            norm=signals["expert_norm"],
        )
        return keep_of_parts(signals, score, self.keep, REASONS)
