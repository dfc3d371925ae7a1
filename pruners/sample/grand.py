"""GraNd: rows by the length of their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_count, check_fraction
from .difficulty import Order, Reduce, check_epochs, check_order, keep_by_order, mean_of_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Grand:
    """Keep the rows with the longest gradient of their own loss (GraNd, arXiv:2107.07075).

    score = mean over epochs and runs of the signal `gradient_norm`; higher = harder = kept. Which
    parameters the gradient is over, the last layer's or all, is decided where the signal is made.

    There is no score at initialisation: the published result of that kind came from a
    checkpoint error, and without it the score follows the input's norm and does not beat random
    (Kirsch 2023, arXiv:2303.14753). The signal is taken after each epoch, the first one included.

    Departures: as for `el2n`. Each row's norm is that of its own gradient, undivided by any batch
    size.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    order
        "hard" keeps the highest, as published; "easy" the lowest.
    first_epoch, last_epoch
        The epochs to use, counted from 0, both ends included; None is the last one of a run.
    reduce
        "mean" or "sum" over those epochs; it moves the score and no choice.
    runs
        Training runs whose epochs stand side by side in the trajectory.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "gradient_norm"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    order: Order = "hard"
    first_epoch: int = 0
    last_epoch: int | None = None
    reduce: Reduce = "mean"
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_epochs(self.first_epoch, self.last_epoch, self.reduce)
        check_order(self.order)
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        difficulty = mean_of_epochs(
            "gradient_norm",
            signals["gradient_norm"],
            runs=self.runs,
            first=self.first_epoch,
            last=self.last_epoch,
            reduce=self.reduce,
        )
        return keep_by_order(signals, difficulty, self.keep, self.order)
