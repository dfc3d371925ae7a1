"""How good a prompt is, from the log probabilities of the classes; how much a word changes it.

Every reward is a mean over rows, float64, higher = better, so rewards of different numbers of
rows compare. A probability of 0 (a log probability of -inf) is legal and 0 log 0 is 0; a reward
that it makes infinite stays infinite, and `Signals` refuses that by name.

ClaPS (arXiv:2310.12774) measures a word v by R(prompt = v) - R(empty prompt), or by the
divergence between the two; see `influence`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..contract import FloatArray, IntArray

FloatArray64 = npt.NDArray[np.float64]

#: Rewards that read the labels; the others are the same for any labels.
LABELLED = frozenset({"log_likelihood", "gap", "double_softmax"})
#: What the RLPrompt margin is multiplied by where the row is wrong, and where it is right.
WRONG, RIGHT = 180.0, 200.0


def rewards(
    logprobs: FloatArray | FloatArray64, labels: IntArray, empty: FloatArray | FloatArray64
) -> dict[str, FloatArray64]:
    """All rewards of P prompts on N rows, each (P,) float64, higher = better.

    `log_likelihood`: mean log p(label), nats. `gap`: RLPrompt's margin (arXiv:2205.12548), the
    mean of 200 * m where m > 0 and of 180 * m elsewhere, m = p(label) - highest other p; a tie
    has m = 0 and is worth 0, whichever side it is counted on. `negative_entropy`: mean of
    sum p log p over classes, nats, label-free. `kl`: mean KL(p under the prompt || p under the
    empty prompt), nats, label-free; an influence by itself. `double_softmax`: the mean
    log-softmax of the *probabilities* at the label, which is what ClaPS's published reward
    computes; only for comparison, as it squeezes every reward of two classes into (-1.32, -0.31).

    Departures from the published code: sums over rows for `kl` and the entropy are means (the
    same order of words); classes tied with the label stay in the gap's maximum (there they leave
    it, and a tie is worth up to 200 * (p + 1): see `pruners.prompt.published`).

    Parameters
    ----------
    logprobs
        (P, N, C), nats, normalised over the C >= 2 classes.
    labels
        (N,) codes of the classes.
    empty
        (N, C), the same rows under the empty prompt.

    Raises
    ------
    InputError
        Shapes disagree, N = 0 or C < 2, a label is no class, or a number is NaN or above 0.
    """
    log_p, log_q, codes = _checked(logprobs, labels, empty)
    p = np.exp(log_p)
    gold = np.arange(len(codes)), codes
    # In one layout, so that a prompt's sums do not depend on the prompts beside it.
    p_gold = np.ascontiguousarray(p[:, *gold])
    others = p.copy()
    others[:, *gold] = -np.inf
    margin = p_gold - others.max(axis=2)
    # log-softmax of probabilities, which lie in [0, 1]: no need to take the maximum off.
    again = p_gold - np.log(np.exp(p).sum(axis=2))
    return {
        "log_likelihood": np.ascontiguousarray(log_p[:, *gold]).mean(axis=1),
        "gap": np.where(margin > 0, RIGHT * margin, WRONG * margin).mean(axis=1),
        "negative_entropy": _times_log(p, log_p).sum(axis=2).mean(axis=1),
        "kl": (_times_log(p, log_p) - _times_log(p, log_q)).sum(axis=2).mean(axis=1),
        "double_softmax": again.mean(axis=1),
    }


def influence(
    logprobs: FloatArray | FloatArray64, labels: IntArray, empty: FloatArray | FloatArray64
) -> dict[str, FloatArray64]:
    """What each of P prompts changes against the empty one, (P,) float64 a reward.

    The reward minus that of the empty prompt on the same rows; `kl`, a comparison already, as
    it is. The empty prompt's own influence is exactly 0. Arguments and errors as `rewards`.
    """
    mine = rewards(logprobs, labels, empty)
    base = rewards(empty[None], labels, empty)
    return {name: mine[name] - (0.0 if name == "kl" else base[name][0]) for name in mine}


def correct(logprobs: FloatArray | FloatArray64, labels: IntArray) -> npt.NDArray[np.bool_]:
    """Whether each row is classified right, (P, N).

    The prediction is the most likely class, the smallest code among equals: so a tie is right
    only where the label is the smallest code of those tied.
    """
    if logprobs.ndim != 3 or labels.shape != logprobs.shape[1:2]:
        raise InputError(
            f"log probabilities (P, N, C) and labels (N,) were expected; found {logprobs.shape}"
            f" and {labels.shape}."
        )
    return np.asarray(logprobs.argmax(axis=2) == labels[None, :], np.bool_)


def accuracy(logprobs: FloatArray | FloatArray64, labels: IntArray) -> FloatArray64:
    """Share of the rows that are classified right, (P,) float64; ties as in `correct`."""
    right = correct(logprobs, labels)
    if right.shape[1] == 0:
        raise InputError("an accuracy needs at least one row; found none.")
    return np.asarray(right.mean(axis=1), np.float64)


def _times_log(p: FloatArray64, log_x: FloatArray64) -> FloatArray64:
    """p * log x, 0 where p = 0."""
    out = np.zeros_like(p)
    np.multiply(p, log_x, out=out, where=p > 0)
    return out


def _checked(
    logprobs: FloatArray | FloatArray64, labels: IntArray, empty: FloatArray | FloatArray64
) -> tuple[FloatArray64, FloatArray64, IntArray]:
    log_p = np.asarray(logprobs, np.float64)
    log_q = np.asarray(empty, np.float64)
    codes = np.asarray(labels)
    if log_p.ndim != 3 or log_p.shape[1:] != log_q.shape or codes.shape != log_q.shape[:1]:
        raise InputError(
            "log probabilities (P, N, C), labels (N,) and the empty prompt's (N, C) were"
            f" expected; found {log_p.shape}, {codes.shape} and {log_q.shape}."
        )
    n, classes = log_q.shape
    if n == 0 or classes < 2:
        raise InputError(f"a reward needs rows and two classes; found {n} rows, {classes} classes.")
    wrong = np.flatnonzero((codes < 0) | (codes >= classes))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"row {row} is labelled {codes[row]}; codes are 0 to {classes - 1}.")
    for name, values in (("of a prompt", log_p), ("of the empty prompt", log_q)):
        bad = np.argwhere(~(values <= 1e-4))
        if len(bad):
            place = tuple(int(i) for i in bad[0])
            raise InputError(
                f"log probabilities {name} must be numbers up to 0; found {values[place]} at"
                f" {place} of {'(prompt, row, class)' if len(place) == 3 else '(row, class)'}."
            )
    return log_p, log_q, codes.astype(np.int64)
