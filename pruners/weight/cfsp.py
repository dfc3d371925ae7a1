"""CFSP: neurons by their share of the three projections and by how loud they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import InputError
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
from .group_selection import REASONS, by_id, keep_of_parts, share_of_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Cfsp:
    """Keep feed-forward neurons that carry weight in all projections (CFSP, arXiv:2409.13199).

    Fine score of neuron j, x_j what it gives: (D_j ||x_j||^b / sum + U_j / sum + G_j / sum) *
    ||x_j||^c, with D, U, G the absolute weights of its column of the down projection and of its
    rows of the up and gate projections; each sum is over the neurons of the layer. Attention is
    left alone.

    Departures. The published code divides each column of the down projection by its own sum,
    after which every neuron's first term is the same and the score is that of the norm's power
    alone; here all three terms are shares of their matrix. The norm is the root mean square.
    Without a gate the third term is left out. The coarse score, between layers, is a budget of
    the plan (`allocation: importance`), there per token.

    Relations: `flap` and `wanda_sp` look at the down projection alone.

    Attributes
    ----------
    keep
        Share of each layer's neurons to keep; exactly ceil(keep * neurons).
    inner, outer
        The exponents b and c.
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "part", "down_mass", "up_mass", "neuron_norm"}
    )
    optional: ClassVar[frozenset[str]] = frozenset({"gate_mass"})
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5
    inner: float = 1.0
    outer: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        for name in ("inner", "outer"):
            value = getattr(self, name)
            if not 0.0 <= value <= 8.0:
                raise InputError(f"`{name}` must lie in [0, 8]; found {value}.")

    def importance(
        self,
        *,
        part: IntArray,
        down: FloatArray,
        up: FloatArray,
        gate: FloatArray | None,
        norm: FloatArray,
    ) -> FloatArray:
        """Fine score of each neuron (N,) float32, from its masses and norm (N,)."""
        loud = norm.astype(np.float64)
        share = share_of_part(down * loud**self.inner, part) + share_of_part(up, part)
        if gate is not None:
            share += share_of_part(gate, part)
        return (share * loud**self.outer).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N neurons; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs | (self.optional & set(signals)))
        rows, place = by_id(signals)
        score = self.importance(
            part=rows["part"],
            down=rows["down_mass"],
            up=rows["up_mass"],
            gate=rows.get("gate_mass"),
            norm=rows["neuron_norm"],
        )[place]
        return keep_of_parts(signals, score, self.keep, REASONS)
