"""Experts by how often, or how strongly, tokens are routed to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_fraction,
)
from .group_selection import REASONS, keep_of_parts

Count = Literal["tokens", "gate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFrequency:
    """Keep the experts that are used most: the plain baseline of expert pruning.

    score = tokens routed to the expert, or the sum of their gates. Experts of one layer are
    compared.

    Relations: the baseline in the tables of `reap` (arXiv:2510.13999) and `easy_ep`;
    `random_experts` is the control.

    Attributes
    ----------
    keep
        Share of each layer's experts to keep; exactly ceil(keep * experts).
    count
        What is summed over the tokens: "tokens" 1, "gate" the gate.
    """

    unit: ClassVar[Unit] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "part", "expert_tokens", "expert_gate"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5
    count: Count = "tokens"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_choice("count", self.count, get_args(Count))

    def importance(self, *, tokens: IntArray, gate: FloatArray) -> FloatArray:
        """Use of each expert (N,) float32."""
        return (tokens if self.count == "tokens" else gate).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N experts; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs)
        score = self.importance(tokens=signals["expert_tokens"], gate=signals["expert_gate"])
        return keep_of_parts(signals, score, self.keep, REASONS)
