"""TDDS: rows whose pace of change varies, late epochs first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..contract import Budget, Scope, Selection, Signals, Unit, check_count, check_fraction
from ..trajectory import by_run, run_mean, windows
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class Tdds:
    """Keep the rows whose predictions change at the least steady pace (TDDS, arXiv:2311.13613).

    The signal `probability_change` holds, from each epoch to the next, sum |p' log(p' / p)| over
    classes. In each window of `window` epochs, so of `window` - 1 changes, D is the Euclidean
    length of (changes - their mean). score = sum over windows k = 0 .. K - 1, oldest first, of
    decay * (1 - decay)^(K - 1 - k) * D_k, averaged over runs; higher = kept. With the default decay
    the newest window weighs 0.9 and the one before it 0.09.

    A run shorter than the window is one window. The paper tunes the number of epochs and the window
    to each budget: few and small ones for small budgets.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    window
        Epochs in a window, 2 or more; with 2, of one change each, all rows score 0.
    epochs
        Use the first so many epochs of each run, 2 or more; None uses all.
    decay
        Weight of the newest window, 0 to 1.
    runs
        Training runs whose epochs stand side by side in the trajectory.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "probability_change"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    window: int = 10
    epochs: int | None = None
    decay: float = 0.9
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_count("window", self.window, low=2)
        if self.epochs is not None:
            check_count("epochs", self.epochs, low=2)
        check_fraction("decay", self.decay)
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        name = "probability_change"
        changes = by_run(name, signals[name], self.runs)
        if self.epochs is not None:
            changes = changes[:, :, : self.epochs - 1]
        average = np.zeros(changes.shape[:2])
        for window in windows(changes, self.window - 1):
            away = window - window.mean(axis=2, keepdims=True)
            length = np.sqrt((away * away).sum(axis=2))
            average = (1 - self.decay) * average + self.decay * length
        return keep_best(signals, run_mean(average), self.keep, ("unsteady", "steady"))
