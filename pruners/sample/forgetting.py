"""Forgetting: rows that were learned and lost again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_count, check_fraction
from .difficulty import Order, check_order, difficulty_of, keep_by_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Keep the rows that were forgotten most often while training (arXiv:1812.05159).

    score = mean over runs of the number of times that the row was right after an epoch and wrong
    after the next; higher = harder = kept. A run in which it was never right counts as its number
    of epochs, so a row that no run ever learned ranks hardest of all; counting its 0 transitions
    as such would take the strangest rows for the easiest.

    Departure: the paper looks at a row whenever it stands in a minibatch, on outputs of training;
    here after each epoch, in evaluation mode. Scores tie often; ties go to the smaller id.

    Measured (benchmarks/RESULTS.md, MNIST): with clean labels better than random rows at 10 to
    50 %; with 20 % wrong labels worse up to 30 %, unless a teacher is listened to.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    order
        "hard" keeps the highest, as published; "easy" the lowest.
    runs
        Training runs whose epochs stand side by side in the trajectory.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "correct"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    order: Order = "hard"
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_order(self.order)
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        difficulty = difficulty_of("forgetting", signals, runs=self.runs)
        return keep_by_order(signals, difficulty, self.keep, self.order)
