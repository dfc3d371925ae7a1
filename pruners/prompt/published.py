"""What the published ClaPS code computes where Prunery departs from it: for comparison only.

Facts of cambridgeltl/ClaPS at commit f2d9127, each as a pure function whose difference from ours
a test shows. No method and no search takes its numbers from here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import rules
from ..contract import BoolArray, FloatArray, IntArray

FloatArray64 = npt.NDArray[np.float64]


def published_rule(score: FloatArray | FloatArray64, q: float = 90.0) -> BoolArray:
    """Words strictly above numpy's percentile `q` of the scores, (N,).

    Keeps nothing where all scores are tied, and a number that ties change elsewhere; ours keeps
    exactly ceil(keep * N).
    """
    if len(score) == 0:
        return np.zeros(0, np.bool_)
    return np.asarray(score > np.percentile(score, q), np.bool_)


def published_control_size(n: int, q: float = 90.0) -> int:
    """Words of the random control: truncated, so up to one fewer than what pruning keeps."""
    return int(n * (100 - q) / 100)


def published_gap(probabilities: FloatArray64, labels: IntArray) -> FloatArray64:
    """The gap reward of P prompts from probabilities (P, N, C) and labels (N,), (P,).

    Every class whose probability equals the label's is taken out of the maximum, not the label
    alone. So an exact tie counts as right, and with nobody left the rival is -1: two tied
    classes are worth 200 * (0.5 + 1) = 300, more than any certain answer (200).
    """
    gold = probabilities[:, np.arange(len(labels)), labels]
    rivals = np.where(probabilities == gold[..., None], -1.0, probabilities)
    gap = gold - rivals.max(axis=2)
    return np.asarray(np.where(gap > 0, 200.0, 180.0) * gap).mean(axis=1)  # type: ignore[no-any-return]


def published_negative_entropy(probabilities: FloatArray64) -> FloatArray64:
    """Sum over rows and classes of p * log p from probabilities (P, N, C), (P,).

    NaN as soon as one probability is 0 (0 * -inf); ours takes 0 log 0 = 0 and the mean.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((probabilities * np.log(probabilities)).sum(axis=(1, 2)))


def published_reward(probabilities: FloatArray64, labels: IntArray) -> FloatArray64:
    """The default "cross entropy" from probabilities (P, N, C), (P,): a softmax too many.

    The mean log-softmax of the probabilities at the label. A certain right answer of two classes
    is worth -0.31 and a certain wrong one -1.31: however wrong a row is, it costs at most 1. The
    reward `double_softmax` is the same number.
    """
    gold = probabilities[:, np.arange(len(labels)), labels]
    return np.asarray((gold - np.log(np.exp(probabilities).sum(axis=2))).mean(axis=1))


def published_crossover(
    one: tuple[int, ...], other: tuple[int, ...], draw: float
) -> tuple[int, ...]:
    """One of the parents, whole; ours takes each word from either."""
    return one if draw < 0.5 else other


def published_choice(scores: FloatArray | FloatArray64) -> int:
    """Place of the prompt that validation chooses: the last maximum; ours is the first."""
    return int(np.flatnonzero(scores == np.max(scores))[-1])


def published_best(pool: list[tuple[int, ...]], rewards: FloatArray64, survivors: int) -> int:
    """Place, before sorting, of the prompt that the genetic search notes as the best.

    The pool is sorted by reward, cut to `survivors` and filled up with children, and is then
    read at the place that the maximum had *before*: a survivor of another rank, or a child that
    nobody has asked about (-1). Ours keeps reward and prompt together.
    """
    best = int(np.argmax(rewards))
    order = rules.best_first(rewards, np.arange(len(pool), dtype=np.int64))[:survivors]
    return int(order[best]) if best < len(order) else -1
