"""DUAL: rows that are hard and uncertain early on, drawn with an eye on the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from ...errors import InputError
from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_count,
    check_fraction,
)
from ..trajectory import Float64Array, by_run, deviation, epoch_mean, run_mean, window_mean
from .best import keep_best

Sampling = Literal["beta", "none"]

# alpha + beta is this and 1, so that alpha is at least 1 and the density bounded at probability 0.
CONCENTRATION = 15.0
# Rows by whose mean probability the density is placed: the highest scoring ones.
ANCHORS = 10
# A score of 0 would never be drawn, and a budget must be met; log of 0 and of 1 - 1 are not finite.
_SCORE_FLOOR = 1e-12
_EDGE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Dual:
    """Keep rows that are hard and uncertain early, drawn by the budget (DUAL, arXiv:2502.06905).

    dual = mean, over all windows of `window` epochs in a row among the first `epochs` and over
    runs, of deviation * (1 - mean) of the true class's probability in the window; higher =
    kept. `sampling="none"` keeps the highest dual.

    `sampling="beta"` (the default) draws rows without replacement, each next one with
    probability proportional to dual * Beta(alpha, beta) density at the row's mean probability p
    over those epochs, with r = 1 - keep the share pruned, m the mean p of the ten rows of
    highest dual, beta = 15 (1 - m) (1 - r^c_d) and alpha = 16 - beta: the more is pruned, the
    easier are the rows drawn. score = log of that weight plus a Gumbel number from (seed, id),
    highest kept (Kool et al. 2019). Its density moves with the budget, so a larger `keep` need
    not keep a superset, which "none" does.

    Needs a run long enough to memorise, 30 epochs (`SHORT_RUN`) or more: in a short one it finds
    flipped labels no better than chance.

    Sources and departures: both formulas were read in the authors' code (behaapyy/dual-pruning);
    the paper's text of the density was not at hand and may have alpha = 15 - beta. That code
    passes the scores and the order of rows in each other's place, and reads p from one epoch:
    not repeated. Its constant factor 10 is left out; p is held within 1e-6 of 0 and 1, and dual
    above 1e-12, so that every row can be drawn.

    Measured (benchmarks/RESULTS.md, MNIST): better than random rows at 10, 30 and 50 %, with
    clean labels and with 20 % wrong ones, with and without a teacher.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    window
        Epochs in a window, 2 or more; a run shorter than it is one window.
    epochs
        Use the first so many epochs of each run, 2 or more.
    sampling
        "beta" or "none".
    c_d
        How late easy rows come in as more is pruned, above 0; higher is later. The authors'
        example for CIFAR-100 has 4.
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
    epochs: int = 30
    sampling: Sampling = "beta"
    c_d: float = 4.0
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_count("window", self.window, low=2)
        check_count("epochs", self.epochs, low=2)
        check_choice("sampling", self.sampling, get_args(Sampling))
        if not 0 < self.c_d < np.inf:
            raise InputError(f"`c_d` must be above 0, and finite; found {self.c_d}.")
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids = signals.require(self.needs)["id"]
        name = "true_probability"
        trajectory = by_run(name, signals[name], self.runs)[:, :, : self.epochs]
        score = run_mean(window_mean(trajectory, self.window, hard_and_uncertain))
        if self.sampling == "beta":
            probability = epoch_mean(trajectory).mean(axis=1)
            weight = log_weight(score, probability, ids, 1 - self.keep, self.c_d)
            gumbel = -np.log(-np.log(rules.uniform(seed, ids)))
            # Cast before ranking: what is stored must be what was compared.
            score = (weight + gumbel).astype(np.float32)
        return keep_best(signals, score, self.keep, ("in_draw", "out_of_draw"))


def hard_and_uncertain(window: Float64Array) -> Float64Array:
    """Deviation * (1 - mean) over the last axis."""
    return np.asarray(deviation(window) * (1 - window.mean(axis=-1)), np.float64)


def log_weight(
    dual: FloatArray, probability: Float64Array, ids: IntArray, pruned: float, c_d: float
) -> Float64Array:
    """Log of dual * Beta density at the mean probability, up to a constant, (N,) float64.

    `dual`, `probability` (N,), `pruned` the share of rows to prune.
    """
    if not len(ids):
        return np.zeros(0)
    anchor = probability[rules.best_first(dual, ids)[:ANCHORS]].mean()
    beta = CONCENTRATION * (1 - anchor) * (1 - pruned**c_d)
    alpha = CONCENTRATION + 1 - beta
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    density = (alpha - 1) * np.log(p) + (beta - 1) * np.log1p(-p)
    return np.asarray(density + np.log(np.maximum(dual, _SCORE_FLOOR)), np.float64)
