"""Whether a compressed model is let through: what it lost against what chance would do.

The noise floor is the standard deviation of the perplexity ratio over bootstrap resamples of the
evaluation rows (Efron 1979): a loss below it cannot be told from the choice of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ACCEPTED, REFUSED = "accepted", "refused"
_EXACT = 1e-9  # a loss of the tolerance itself is accepted, whatever its last bit


@dataclass(frozen=True, slots=True)
class Ratio:
    """Perplexity of one model over another's on the same rows; 1 is no loss.

    Attributes
    ----------
    value
        exp of the difference of mean losses.
    noise
        Its standard deviation over resamples of the rows.
    low, high
        2.5 and 97.5 percent points of the resamples.
    """

    value: float
    noise: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a model reached in a task; higher is better.

    Attributes
    ----------
    metric
        Its name in the harness.
    value, stderr
        Mean and its standard error; NaN where the harness gives none.
    """

    metric: str
    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`accepted`, and why or why not, in sentences."""

    accepted: bool
    reasons: tuple[str, ...]

    @property
    def word(self) -> str:
        """accepted or refused."""
        return ACCEPTED if self.accepted else REFUSED


def perplexity_ratio(
    nll: Floats, dense_nll: Floats, count: Ints, *, seed: int, resamples: int
) -> Ratio:
    """The ratio over N rows and its noise.

    Parameters
    ----------
    nll, dense_nll
        (N,) float64, sums of a row, nats.
    count
        (N,) int64 targets of a row.

    Raises InputError below two rows, from which no noise can be told.
    """
    if len(count) < 2:
        raise InputError(
            f"expected at least 2 evaluation rows to tell a loss from noise, found {len(count)}."
            " Give more rows (raise `rows` of calibration_rows)."
        )
    difference = nll - dense_nll
    drawn = np.empty(resamples)
    for number in range(resamples):
        rng = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, number])
        times = np.bincount(rng.integers(0, len(count), len(count)), minlength=len(count))
        tokens = max(1, int(times @ count))
        drawn[number] = np.exp(times @ difference / tokens)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(np.exp(difference.sum() / count.sum()))
    return Ratio(value, float(drawn.std(ddof=1)), float(low), float(high))


def judge(
    ratio: Ratio,
    tasks: Mapping[str, tuple[TaskScore, TaskScore]],
    *,
    tolerance: float,
    task_tolerance: float,
) -> Verdict:
    """Accept where perplexity and every task lose no more than the tolerance, or than the noise.

    `tasks` has the dense and the compressed model's score by name. A task's noise is the standard
    error of the difference, taken as that of two independent scores.
    """
    allowed = max(tolerance, ratio.noise)
    rise = ratio.value - 1
    words = (
        f"perplexity {rise:+.2%} against the dense model, allowed {allowed:.2%} (tolerance"
        f" {tolerance:.2%}, noise floor {ratio.noise:.2%})"
    )
    bad = not rise <= allowed + _EXACT  # a NaN is refused too
    made = [("refused: " if bad else "") + words]
    for name, (dense, other) in tasks.items():
        change = other.value - dense.value
        noise = math.hypot(dense.stderr, other.stderr)
        least = max(task_tolerance, noise if math.isfinite(noise) else 0.0)
        lost = not change >= -least - _EXACT
        bad = bad or lost
        made.append(
            f"{'refused: ' if lost else ''}{name} ({other.metric}) {change:+.4f}, allowed"
            f" {-least:+.4f}"
        )
    return Verdict(not bad, tuple(made))


def same_budget(
    rows: Sequence[Mapping[str, object]], control: Sequence[Mapping[str, object]], most: float
) -> None:
    """Refuse a control that kept another share than the model it is held against.

    The share is of the rows' units (weights, heads, neurons, experts, layers), each kind by
    itself; `most` is how far they may be apart.

    Raises InputError with both shares.
    """
    ours, theirs = kept_shares(rows), kept_shares(control)
    for unit in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(unit), theirs.get(unit)
        if mine is None or other is None or abs(mine - other) > most:
            shares = [f"{share:.4f}" if share is not None else "none" for share in (mine, other)]
            raise InputError(
                f"control: expected a model at the same budget; found {unit}s kept {shares[0]} in"
                f" the model and {shares[1]} in the control. Compress the control under the same"
                " plan options with `method: random_weights` (or the random method of its unit)."
            )


def kept_shares(rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Share kept of each kind of unit, from rows of a compressed table."""
    total: dict[str, int] = {}
    kept: dict[str, int] = {}
    for row in rows:
        unit = str(row["unit"])
        total[unit] = total.get(unit, 0) + int(row["total"])  # type: ignore[call-overload]
        kept[unit] = kept.get(unit, 0) + int(row["kept"])  # type: ignore[call-overload]
    return {unit: kept[unit] / total[unit] for unit in total if total[unit]}
