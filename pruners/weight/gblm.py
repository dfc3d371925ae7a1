"""GBLM: Wanda with the gradients of the language model's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import InputError
from ..contract import (
    Budget,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_fraction,
)
from .weight_selection import keep_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Gblm:
    """Keep in each row the highest |weight| * (input norm + scaled gradient) (arXiv:2311.04902).

    score = |w| * ||x||_2 + |w| * scale * G, G = sqrt(sum over rows of g^2) (`norm` l2) or the sum
    of |g| (l1), g the gradient of a calibration row's mean next-token loss; compared within the
    row of the matrix. Unlike in Wanda the norm's scale matters: as in the published code it is
    sqrt(sum over tokens of x^2 / calibration rows), and G is a sum over rows.

    Relations: Wanda where `scale` is 0.

    Attributes
    ----------
    keep
        Share of each row's weights to keep; sparsity is 1 - keep.
    scale
        What gradients are multiplied by; at least 0.
    norm
        How `weight_gradient` sums the rows: it says which signal is to be made.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "output", "weight", "input_norm", "weight_gradient"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "output"
    keep: float = 0.5
    scale: float = 100.0
    norm: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_choice("norm", self.norm, ("l1", "l2"))
        if not 0.0 <= self.scale < float("inf"):
            raise InputError(f"`scale` must be finite and at least 0; found {self.scale}.")

    def importance(self, *, weight: Any, input_norm: Any, weight_gradient: Any) -> Any:
        """|w| (||x|| + scale G), elementwise with broadcasting, for NumPy's arrays or tensors."""
        return abs(weight) * (input_norm + self.scale * weight_gradient)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights of one matrix; raises InputError where a signal is missing."""
        signals.require(self.needs)
        score = self.importance(
            weight=signals["weight"],
            input_norm=signals["input_norm"],
            weight_gradient=signals["weight_gradient"],
        )
        return keep_of_rows(signals, score, self.keep)
