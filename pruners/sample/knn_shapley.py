"""KNN-Shapley: rows by their worth to a nearest-neighbour classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnShapley:
    """Keep the rows that are worth most to a k-nearest-neighbour classifier (arXiv:1908.08619).

    score = the signal `shapley`: the row's Shapley value in the accuracy of such a classifier on
    held-out rows; higher = kept. Values below 0 belong to rows that do harm, often mislabelled
    ones. How far each held-out row's neighbours are followed is decided where the signal is made.

    Measured (benchmarks/RESULTS.md, MNIST, 20 % wrong labels): keeps none of them, and loses
    to random rows at 30 and 50 %: what it keeps is easy.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "shapley"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        score = signals.require(self.needs)["shapley"]
        return keep_best(signals, score, self.keep, ("worth_more", "worth_less"))
