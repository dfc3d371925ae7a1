"""Memorisation: rows that a model gets right only if it saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .difficulty import Order, check_order, difficulty_of, keep_by_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Memorisation:
    """Keep the rows that are memorised most (Feldman and Zhang 2020, arXiv:2008.03703).

    score = the signal `memorisation`: the probability that a model trained with the row gets it
    right, minus the same without it, estimated over hundreds to thousands of models trained on
    random subsets. It is imported, never computed here; higher = harder = kept.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    order
        "hard" keeps the highest, as published; "easy" the lowest.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "memorisation"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    order: Order = "hard"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_order(self.order)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        return keep_by_order(signals, difficulty_of("memorisation", signals), self.keep, self.order)
