"""Magnitude: small weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .weight_selection import keep_of_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude:
    """Keep the weights of a matrix that are largest in magnitude (Han et al., arXiv:1506.02626).

    score = |w|, compared over the whole matrix. Needs no calibration rows.

    Departures: exactly ceil(keep * N) weights stay, where code that cuts at "score <= the k-th
    value" drops one too many.

    Relations: what Wanda, SparseGPT and GBLM must beat; Wanda with inputs of equal norm is
    magnitude within each row.

    Attributes
    ----------
    keep
        Share of the matrix's weights to keep; sparsity is 1 - keep.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "weight"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, weight: Any) -> Any:
        """|w|, elementwise, for arrays of NumPy or tensors."""
        return abs(weight)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights of one matrix; raises InputError where a signal is missing."""
        signals.require(self.needs)
        return keep_of_matrix(signals, self.importance(weight=signals["weight"]), self.keep)
