"""Wanda: a weight counts as much as its input is loud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .weight_selection import keep_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda:
    """Keep in each row of a matrix the highest |weight| * norm of its input (arXiv:2306.11695).

    score = |w_ij| * ||x_j||_2, compared within the row i (the weights of one output). The norm's
    scale does not matter.

    Departures: exactly ceil(keep * in) a row, ties to the smaller column; the published code
    drops int(in * sparsity) by a sort that loses tied weights from the left.

    Relations: magnitude where all inputs are equally loud; GBLM adds a gradient's term;
    SparseGPT takes correlations of inputs into account and mends what stays.

    Attributes
    ----------
    keep
        Share of each row's weights to keep; sparsity is 1 - keep.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "output", "weight", "input_norm"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "output"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, weight: Any, input_norm: Any) -> Any:
        """|w| * ||x||, elementwise with broadcasting, for arrays of NumPy or tensors."""
        return abs(weight) * input_norm

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights of one matrix; raises InputError where a signal is missing."""
        signals.require(self.needs)
        score = self.importance(weight=signals["weight"], input_norm=signals["input_norm"])
        return keep_of_rows(signals, score, self.keep)
