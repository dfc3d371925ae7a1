"""EASY-EP: experts by what they add to tokens that the layer's experts turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, FloatArray, Scope, Selection, Signals, Unit, check_fraction
from .group_selection import REASONS, keep_of_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyEp:
    """Keep the experts that a domain's tokens need (EASY-EP, arXiv:2504.06792).

    score = sum over tokens routed to the expert of g * ||E(x)|| * max(0, 1 - cosine of the token
    before and after the routed experts): output-aware importance, weighed by the token's own.
    Experts of one layer are compared. The paper calibrates on the 25 longest samples of a domain.

    Departures: none of formula; counts are exact.

    Relations: `reap` takes a mean instead of a sum and leaves the cosine out.

    Attributes
    ----------
    keep
        Share of each layer's experts to keep; exactly ceil(keep * experts).
    """

    unit: ClassVar[Unit] = "expert"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "part", "expert_easy"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, easy: FloatArray) -> FloatArray:
        """The sum of each expert (N,) float32, as it is."""
        return easy

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N experts; raises InputError where a signal is missing or not legal."""
        score = self.importance(easy=signals.require(self.needs)["expert_easy"])
        return keep_of_parts(signals, score, self.keep, REASONS)
