"""Groups by the length of their weights: a control that random often beats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..contract import Budget, FloatArray, Scope, Selection, Signals, Unit, check_fraction
from .group_selection import REASONS, keep_of_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeGroups:
    """Keep the heads and neurons with the longest weights (the L2 row of arXiv:2305.11627).

    score = square root of the sum of squares of all weights that go with the group; groups of
    one part are compared. LLM-Pruner's table has it far behind random groups: a control.

    Relations: the structured form of `magnitude`; beside `random_groups`.

    Attributes
    ----------
    keep
        Share of each part's groups to keep; exactly ceil(keep * groups).
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "part", "weight_square"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, square: FloatArray) -> FloatArray:
        """Length of each group's weights (N,) float32 from the sum of their squares."""
        return np.sqrt(square)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N groups; raises InputError where a signal is missing or not legal."""
        square = signals.require(self.needs)["weight_square"]
        return keep_of_parts(signals, self.importance(square=square), self.keep, REASONS)
