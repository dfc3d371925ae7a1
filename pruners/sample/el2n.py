"""EL2N: rows by the length of the error vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_count, check_fraction
from .difficulty import Order, Reduce, check_epochs, check_order, keep_by_order, mean_of_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class El2n:
    """Keep the rows with the longest error vector (EL2N, arXiv:2107.07075).

    score = mean over epochs and runs of the signal `el2n`, the Euclidean length of
    (softmax(logits) - one-hot label); higher = harder = kept. Flipped labels score high too, so
    with noisy labels and a small `keep` the noise is what is kept: cut the hardest first (`ccs`)
    or keep the easy ones.

    Departures: the paper scores one early epoch (10 to 20 of 200) over ten or more runs; here
    it is every epoch unless `first_epoch` and `last_epoch` say otherwise, and as many runs as
    were trained. Others sum over the first ten epochs of one run: `last_epoch=9, reduce="sum"`.

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
    needs: ClassVar[frozenset[str]] = frozenset({"id", "el2n"})
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
            "el2n",
            signals["el2n"],
            runs=self.runs,
            first=self.first_epoch,
            last=self.last_epoch,
            reduce=self.reduce,
        )
        return keep_by_order(signals, difficulty, self.keep, self.order)
