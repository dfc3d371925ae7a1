"""SparseGPT: a weight counts as much as its loss costs once the others have made up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .weight_selection import keep_of_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGpt:
    """Keep the weights whose removal costs most after the optimal update (arXiv:2301.00774).

    score = w^2 / U_jj^2, U the upper Cholesky factor of the inverse of H = (2/n) X X' (damped),
    compared over the matrix. `second_order.solve` uses it block by block: the mask of 128 inputs
    is chosen on weights that already carry the updates for the inputs before them, and what
    stays is changed so that the outputs stay. Called by itself it scores the weights it is given.

    Departures: exact counts in each block (the published code's "<= the k-th value" drops one
    too many); a block's mask is fixed for 16 or 32 inputs at a time, which loses less, most of
    all in narrow matrices, where one block is all inputs; inputs that are always 0 get the mean
    of the others' diagonal, not 1, so that the damping does not depend on the scale of H.

    Relations: the optimal brain surgeon with the inputs in a fixed order; with uncorrelated
    inputs the score is w^2 * ||x||^2, Wanda's squared.

    Attributes
    ----------
    keep
        Share of the matrix's weights to keep; sparsity is 1 - keep.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "weight", "hessian_diagonal"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, weight: Any, hessian_diagonal: Any) -> Any:
        """w^2 / U_jj^2, elementwise with broadcasting, for arrays of NumPy or tensors."""
        return weight * weight / hessian_diagonal

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights of one matrix; raises InputError where a signal is missing."""
        signals.require(self.needs)
        score = self.importance(
            weight=signals["weight"], hessian_diagonal=signals["hessian_diagonal"]
        )
        return keep_of_matrix(signals, score, self.keep)
