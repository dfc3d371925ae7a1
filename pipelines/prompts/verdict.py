"""Whether a found prompt is taken: judged on rows that no search has seen, and never worse.

The found prompt must beat the empty prompt and the one written by hand on the validation rows by
more than one standard error of the paired difference (bootstrap over rows). Otherwise the better
of those two is taken. The test rows play no part in that; they say what the choice is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners.contract import FloatArray, IntArray
from ...pruners.signals.prompt_rewards import correct

Judge = Literal["accuracy", "log_likelihood"]
FOUND, EMPTY, MANUAL, CONTROL = "found", "empty", "manual", "control"
RESAMPLES = 2000

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """How a prompt does on N rows.

    Attributes
    ----------
    hit
        (N,) float64, 1 where the gold class is predicted (`prompt_rewards.correct`), else 0.
    gold
        (N,) float64, log probability of the gold class, nats.
    """

    hit: Float64Array
    gold: Float64Array

    @classmethod
    def of(cls, logprobs: FloatArray, labels: IntArray) -> Score:
        """From log probabilities (N, C) and gold codes (N,)."""
        gold = logprobs[np.arange(len(labels)), labels].astype(np.float64)
        return cls(correct(logprobs[None], labels)[0].astype(np.float64), gold)

    @property
    def accuracy(self) -> float:
        """Mean of `hit`; NaN without rows."""
        return float(self.hit.mean()) if len(self.hit) else float("nan")

    @property
    def log_likelihood(self) -> float:
        """Mean of `gold`, nats; NaN without rows."""
        return float(self.gold.mean()) if len(self.gold) else float("nan")

    def judged_by(self, judge: Judge) -> Float64Array:
        """The value of each row that a comparison is about, (N,)."""
        return self.hit if judge == "accuracy" else self.gold


@dataclass(frozen=True, slots=True)
class Lead:
    """Mean difference of a found prompt and a rival over rows, and its standard error."""

    mean: float
    error: float

    @property
    def clear(self) -> bool:
        """Beyond one standard error."""
        return self.mean > self.error


def standard_error(values: Float64Array, *, seed: int, resamples: int = RESAMPLES) -> float:
    """Standard deviation of the mean over bootstrap resamples of the rows; 0 below two rows.

    The resamples depend on (seed, N) alone, so differences of several prompts are paired.
    """
    n = len(values)
    if n < 2:
        return 0.0
    rng = np.random.Generator(np.random.Philox([seed, n]))
    means = np.empty(resamples)
    block = max(1, (1 << 22) // n)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(0, n, size=(stop - start, n))
        means[start:stop] = values[drawn].mean(axis=1)
    return float(means.std(ddof=1))


def lead(found: Score, rival: Score, judge: Judge, *, seed: int) -> Lead:
    """The lead of a found prompt over a rival on the same rows, positive = found is better."""
    difference = found.judged_by(judge) - rival.judged_by(judge)
    if not len(difference):
        raise InputError("a lead needs rows to be judged on; found none.")
    return Lead(float(difference.mean()), standard_error(difference, seed=seed))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which contender is taken, and why; `leads` are those of the found prompt over each other."""

    chosen: str
    reason: str
    leads: Mapping[str, Lead]


def judge_prompts(scores: Mapping[str, Score], judge: Judge, *, seed: int) -> Verdict:
    """Choose among the found, the empty and the manual prompt by their validation rows.

    Parameters
    ----------
    scores
        Contender to its score on the validation rows; `found` and `empty` are among them,
        `manual` where there is one. `control` gets a lead and is never chosen.
    judge
        What is compared: accuracy, or the mean log probability of the gold class.

    Raises
    ------
    InputError
        There are no validation rows.
    """
    leads = {
        name: lead(scores[FOUND], score, judge, seed=seed)
        for name, score in scores.items()
        if name != FOUND
    }
    rivals = [name for name in (EMPTY, MANUAL) if name in leads]
    unbeaten = [name for name in rivals if not leads[name].clear]
    if not unbeaten:
        return Verdict(FOUND, f"beats the {' and the '.join(rivals)} prompt by over 1 s.e.", leads)
    # The first of the equals is the empty prompt: it is the shorter one.
    best = max(rivals, key=lambda name: (_rank(scores[name], judge), -rivals.index(name)))
    return Verdict(
        best, f"found does not beat the {' and the '.join(unbeaten)} prompt by over 1 s.e.", leads
    )


def best_of(scores: Sequence[Score], judge: Judge) -> int:
    """Place of the best: by the judge, then by the other measure, then the first."""
    return max(range(len(scores)), key=lambda number: (_rank(scores[number], judge), -number))


def _rank(score: Score, judge: Judge) -> tuple[float, float]:
    first, second = score.accuracy, score.log_likelihood
    return (first, second) if judge == "accuracy" else (second, first)
