"""Dyn-Unc: rows whose probability keeps moving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_count, check_fraction
from ..trajectory import by_run, deviation, run_mean, window_mean
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class DynUnc:
    """Keep the rows whose prediction was least settled while training (Dyn-Unc, arXiv:2306.05175).

    score = mean, over all windows of `window` epochs in a row and over runs, of the standard
    deviation of the true class's probability in the window; higher = kept. A run shorter than
    the window is one window.

    Needs a run long enough to memorise, 30 epochs (`SHORT_RUN`) or more: in a short one flipped
    labels rank below clean rows (AUC about 0.2).

    Departures: the published constant factor 10 is left out, and the deviation divides by the
    window's size; neither moves a rank.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    window
        Epochs in a window, 2 or more.
    runs
        Training runs whose epochs stand side by side in the trajectory.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "true_probability"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    window: int = 10
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_count("window", self.window, low=2)
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        name = "true_probability"
        trajectory = by_run(name, signals[name], self.runs)
        score = run_mean(window_mean(trajectory, self.window, deviation))
        return keep_best(signals, score, self.keep, ("unsettled", "settled"))
