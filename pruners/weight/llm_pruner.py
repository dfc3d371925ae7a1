"""LLM-Pruner: heads and neurons by a Taylor estimate of what their loss would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

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
from .group_selection import REASONS, Float64Array, by_id, group_sum, keep_of_parts, owners

Order = Literal["vector", "element1", "element2", "mix"]
Reduce = Literal["sum", "mean", "max", "prod"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmPruner:
    """Keep heads and neurons that the loss is sensitive to (LLM-Pruner, arXiv:2305.11627).

    g is the gradient of the mean loss, over the calibration rows. Salience of a weight:
    "element1" |w g|, "element2" |w^2 mean(g^2)|, "mix" |w g - w^2 mean(g^2) / 2|; of a channel
    (one output of query, key, value, gate or up, one input of attention output or down) their
    sum, or for "vector" |sum w g|. The channels of a group are summed in each coupled matrix,
    and `reduce` combines the matrices to the score; groups of one part are compared.

    Departures: the query heads of one key-value head are one group, with all their rows (the
    published code sums heads a stride apart); "mix" is the same in both halves (the code's
    branch for attention has a sign error and reads what it writes); its rules that take the
    first or second matrix alone are left out. Which layers are spared is said by the plan.

    Relations: `wanda_sp` and `flap` need no gradients.

    Attributes
    ----------
    keep
        Share of each part's groups to keep; exactly ceil(keep * groups).
    order
        The estimate.
    reduce
        How the coupled matrices of a group are combined.
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "part", "tensor_offset", "tensor_salience"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5
    order: Order = "element1"
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_choice("order", self.order, get_args(Order))
        check_choice("reduce", self.reduce, get_args(Reduce))

    def channel_salience(self, *, weight: Any, gradient: Any, gradient_square: Any) -> Any:
        """Salience of each channel (C,), from weights (C, K) and gradients of NumPy or torch.

        `gradient` and `gradient_square` are means over rows of g and of g^2; the second is read
        by "element2" and "mix" alone.
        """
        if self.order == "vector":
            return abs((weight * gradient).sum(-1))
        if self.order == "element1":
            return abs(weight * gradient).sum(-1)
        second = weight * weight * gradient_square
        if self.order == "element2":
            return abs(second).sum(-1)
        return abs(weight * gradient - second / 2).sum(-1)

    def importance(self, *, offset: IntArray, salience: FloatArray) -> FloatArray:
        """Combined salience of each group (N,) float32; 0 for a group without matrices."""
        if self.reduce in ("sum", "mean"):
            total = group_sum(salience, offset)
            size = np.maximum(np.diff(offset), 1) if self.reduce == "mean" else 1
            return (total / size).astype(np.float32)
        start = 0.0 if self.reduce == "max" else 1.0
        made: Float64Array = np.full(len(offset) - 1, start)
        join = np.maximum if self.reduce == "max" else np.multiply
        join.at(made, owners(offset), salience.astype(np.float64))
        return np.where(np.diff(offset) > 0, made, 0.0).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N groups; raises InputError where a signal is missing or not legal."""
        signals.require(self.needs)
        rows, place = by_id(signals)
        score = self.importance(offset=rows["tensor_offset"], salience=rows["tensor_salience"])
        return keep_of_parts(signals, score[place], self.keep, REASONS)
