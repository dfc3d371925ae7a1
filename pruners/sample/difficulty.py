"""How hard a row is, by name, and the rules that methods over one number of it share.

Every score here is (N,) float32 and HIGHER = HARDER.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from .. import rules
from ..contract import (
    Array,
    BoolArray,
    FloatArray,
    IntArray,
    Selection,
    Signals,
    check_choice,
    check_count,
)
from ..trajectory import Float64Array, by_run, deviation, epoch_mean, run_mean, window_mean
from .best import keep_best

Order = Literal["hard", "easy"]
Formula = Callable[[Array], Float64Array]

CUT_REASONS = ("in_share", "beyond_share", "cut_as_hardest", "refilled")


def forgotten(correct: Array) -> Float64Array:
    """Times that a row was right after an epoch and wrong after the next, (N, runs) float64.

    `correct` (N, runs, epochs) bool. A run in which the row was never right counts as its
    number of epochs, which no other row can reach.
    """
    events = (correct[:, :, :-1] & ~correct[:, :, 1:]).sum(axis=2)
    never = ~correct.any(axis=2)
    return np.asarray(np.where(never, correct.shape[2], events), np.float64)


def _easiness(trajectory: Array) -> Float64Array:
    return -epoch_mean(trajectory)


def _window_deviation(trajectory: Array) -> Float64Array:
    return window_mean(trajectory, 10, deviation)


def _deviation(trajectory: Array) -> Float64Array:
    return window_mean(trajectory, trajectory.shape[2], deviation)


# Name to the signal that it needs and its formula, (N, runs, epochs) -> (N, runs).
DIFFICULTY: dict[str, tuple[str, Formula]] = {
    "el2n": ("el2n", epoch_mean),
    "grand": ("gradient_norm", epoch_mean),
    "forgetting": ("correct", forgotten),
    "aum": ("margin", _easiness),
    "loss": ("loss_trajectory", epoch_mean),
    "dyn_unc": ("true_probability", _window_deviation),
    "variability": ("true_probability", _deviation),
    "memorisation": ("memorisation", epoch_mean),
}


def difficulty_needs(name: str) -> frozenset[str]:
    """The signals that `difficulty_of` reads for this name.

    Raises
    ------
    InputError
        The name is not in `DIFFICULTY`.
    """
    check_choice("difficulty", name, tuple(DIFFICULTY))
    return frozenset({"id", DIFFICULTY[name][0]})


def difficulty_of(name: str, signals: Signals, *, runs: int = 1) -> FloatArray:
    """How hard each row is, (N,) float32, higher = harder.

    `el2n`, `grand` and `loss`: mean of the signal over epochs. `forgetting`: see `forgotten`.
    `aum`: minus the mean margin. `dyn_unc`: mean deviation of the true class's probability in
    windows of 10 epochs; `variability`: its deviation over the whole run (the data map's,
    Swayamdipta et al. 2020, arXiv:2009.10795). `memorisation`: as given. All are means over
    runs and use every epoch; the methods of these names have options.

    Parameters
    ----------
    name
        A key of `DIFFICULTY`.
    signals
        N rows with the signals of `difficulty_needs(name)`.
    runs
        Training runs whose epochs stand side by side in a trajectory.

    Raises
    ------
    InputError
        The name is unknown, a signal is missing or not finite, or the width of a trajectory is
        no positive multiple of `runs`.
    """
    signals.require(difficulty_needs(name))
    check_count("runs", runs, low=1)
    signal, formula = DIFFICULTY[name]
    values = signals[signal]
    if values.ndim == 1:  # given once, over no runs
        values, runs = values[:, None], 1
    return run_mean(formula(by_run(signal, values, runs)))


def check_order(order: str) -> None:
    """Refuse an order that is neither "hard" nor "easy"."""
    check_choice("order", order, get_args(Order))


def keep_by_order(
    signals: Signals, difficulty: FloatArray, fraction: float, order: Order
) -> Selection:
    """Keep exactly ceil(fraction * N) rows: the hardest, or the easiest.

    score = `difficulty` (N,) where hard rows are kept, minus it where easy ones are.
    """
    if order == "hard":
        return keep_best(signals, difficulty, fraction, ("hard", "easy"))
    return keep_best(signals, -difficulty, fraction, ("easy", "hard"))


def hardest(difficulty: FloatArray, ids: IntArray, cutoff: float) -> BoolArray:
    """The floor(cutoff * N) hardest rows, (N,) bool; of equal ones the larger ids."""
    n = len(ids)
    easier, _ = rules.top_count(-difficulty, ids, n - rules.floor_of(n, cutoff))
    return ~easier


def keep_uncut_first(
    signals: Signals, place: IntArray, cut: BoolArray, fraction: float
) -> Selection:
    """Keep exactly ceil(fraction * N) rows: lowest place first, cut rows after all others.

    `place` (N,) counts from 0 among the rows that are not `cut` (N,); what it holds for cut
    rows is not read: they come back easiest first, by the signal `difficulty`. score = minus
    the place, which float32 holds exactly up to 16.7 million.
    """
    behind = rules.rank_in_group(-signals["difficulty"], signals["id"], cut.astype(np.int64))
    after = int(place[~cut].max(initial=-1)) + 1
    score = -np.where(cut, after + behind, place).astype(np.float32)
    keep, border = rules.top_fraction(score, signals["id"], fraction)
    reason = np.where(keep, np.where(cut, 3, 0), np.where(cut, 2, 1)).astype(np.uint8)
    return Selection(keep, score, reason, CUT_REASONS, np.full(signals.n, border, np.float32))
