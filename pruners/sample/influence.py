"""Influence: rows that held-out rows depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Keep the rows of the highest influence on held-out rows (arXiv:2008.03703).

    score = the signal `influence`, highest kept: one number a row of how much the accuracy on
    held-out rows hangs on it, such as the largest influence on any of them, or the sum of
    absolute influences, the two reductions that Sorscher et al. 2022 (arXiv:2206.14486) prune
    by. It is imported, never computed here: the estimate takes hundreds to thousands of models
    trained on random subsets.

    Relations: `memorisation` is a row's influence on itself; `knn_shapley` values rows for
    held-out ones without training.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "influence"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        score = signals.require(self.needs)["influence"]
        return keep_best(signals, score, self.keep, ("influential", "little_influence"))
