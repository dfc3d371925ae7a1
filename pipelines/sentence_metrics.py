"""Figures of one decision, of sentence scores and of ranked passages; arrays in, numbers out.

Curves over thresholds and the bootstrap are in `context_metrics`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .context_metrics import Bools, Floats, Interval, Ints, Labelled, interval


@dataclass(frozen=True, slots=True)
class Confusion:
    """Per-question counts of sentences; (Q,) int64 each, over sentences with a known label."""

    hit: Ints
    false_alarm: Ints
    miss: Ints

    def f_beta(self, weights: Ints, *, beta: float = 2.0) -> dict[str, Interval]:
        """Micro precision, recall and F-beta over sentences, with intervals by question."""
        n = int((self.hit + self.false_alarm + self.miss > 0).sum())
        ones = np.ones((1, len(self.hit)), np.int64)
        found: dict[str, Interval] = {}
        exact, draws = self._rates(ones, beta), self._rates(weights, beta)
        for name, value in exact.items():
            found[name] = interval(float(value[0]), draws[name], n)
        return found

    def _rates(self, weights: Ints, beta: float) -> dict[str, Floats]:
        hit, false, miss = (weights @ a for a in (self.hit, self.false_alarm, self.miss))
        b = beta * beta
        return {
            "precision": _ratio(hit, hit + false),
            "recall": _ratio(hit, hit + miss),
            f"f{beta:g}": _ratio((1 + b) * hit, (1 + b) * hit + b * miss + false),
        }


def _ratio(top: npt.ArrayLike, bottom: npt.ArrayLike) -> Floats:
    a, b = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    shares: Floats = np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
    return shares


def confusion(data: Labelled, keep: Bools) -> Confusion:
    """Counts of kept and dropped sentences against their labels, by question."""
    owner, q = data.owner, data.questions

    def count(mask: Bools) -> Ints:
        return np.bincount(owner[mask], minlength=q).astype(np.int64)

    return Confusion(
        hit=count(keep & (data.label == 1)),
        false_alarm=count(keep & (data.label == 0)),
        miss=count(~keep & (data.label == 1)),
    )


def auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties half (Mann-Whitney U); NaN if one
    class is empty."""
    values, truth = np.asarray(score, np.float64), np.asarray(positive, np.bool_)
    p, n = int(truth.sum()), int((~truth).sum())
    if not p or not n:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    midrank = (ends - counts + 1 + ends) / 2  # ranks from 1, tied values share their mean
    return float((midrank[inverse][truth].sum() - p * (p + 1) / 2) / (p * n))


def auroc_within(data: Labelled, score: npt.ArrayLike) -> float:
    """Mean over passages of the AUROC among the passage's own sentences.

    It asks about order inside a passage alone, as the best-k rule does; `auroc` asks in
    addition that scores of different passages are comparable, as one threshold for all does.
    """
    values = np.asarray(score, np.float64)
    found = []
    bounds = np.append(np.searchsorted(data.passage, np.arange(len(data.question))), len(values))
    for start, end in itertools.pairwise(bounds):
        label = data.label[start:end]
        if (label == 1).any() and (label == 0).any():
            known = label >= 0
            found.append(auroc(values[start:end][known], label[known] == 1))
    return float(np.mean(found)) if found else float("nan")


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often a sentence with a stated probability was evidence.

    `edges` (bins+1,), `count`, `stated` (mean probability) and `observed` (share of evidence)
    (bins,), NaN in an empty bin; `ece` is the count-weighted mean gap (expected calibration
    error, Naeini et al. 2015), `brier` the mean squared error.
    """

    edges: Floats
    count: Ints
    stated: Floats
    observed: Floats
    ece: float
    brier: float


def reliability(
    probability: npt.ArrayLike, positive: npt.ArrayLike, *, bins: int = 10
) -> Reliability:
    """Calibration over equal-width bins; a probability of exactly 1 goes to the last bin."""
    p, truth = np.asarray(probability, np.float64), np.asarray(positive, np.float64)
    if p.size and (not np.isfinite(p).all() or p.min() < 0 or p.max() > 1):
        raise InputError(
            f"calibration needs probabilities in [0, 1]; found {p.min():g}..{p.max():g}."
        )
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    stated = _ratio(np.bincount(place, weights=p, minlength=bins), count)
    observed = _ratio(np.bincount(place, weights=truth, minlength=bins), count)
    full = count > 0
    gaps = np.abs(stated - observed)[full]
    return Reliability(
        edges=np.linspace(0, 1, bins + 1),
        count=count.astype(np.int64),
        stated=stated,
        observed=observed,
        ece=float((gaps * count[full]).sum() / len(p)) if len(p) else float("nan"),
        brier=float(np.mean((p - truth) ** 2)) if len(p) else float("nan"),
    )


def by_position(data: Labelled, kept: Bools, weights: Ints) -> dict[str, Interval]:
    """Share of evidence sentences kept when they open, close or stand inside their passage.

    Sentences of passages with fewer than three sentences are left out: there the first or the
    last is all there is. `kept` is (N,) bool.
    """
    position, size = data.position, data.size[data.passage]
    places = {
        "first": position == 0,
        "middle": (position > 0) & (position < size - 1),
        "last": position == size - 1,
    }
    found = {}
    for name, place in places.items():
        mask = (data.label == 1) & (size >= 3) & place
        owner = data.owner[mask]
        total = np.bincount(owner, minlength=data.questions)
        hits = np.bincount(owner, weights=kept[mask].astype(float), minlength=data.questions)
        value = float(_ratio(hits.sum(), total.sum()))
        found[name] = interval(value, _ratio(weights @ hits, weights @ total), int(total.sum()))
    return found


def reciprocal_rank(question: Ints, score: npt.ArrayLike, relevant: Ints, questions: int) -> Floats:
    """(Q,) float64, 1 / rank of the best relevant passage; NaN where none is relevant.

    Ties count against us: among equal scores the relevant passages come last. Data sets list
    the gold passage first, so breaking ties by position would reward a constant score.
    """
    return _per_list(question, score, relevant, questions, lambda gain: 1.0 / (1 + np.argmax(gain)))


def ndcg(
    question: Ints, score: npt.ArrayLike, relevant: Ints, questions: int, *, k: int = 10
) -> Floats:
    """(Q,) float64, nDCG@k with binary gains and log2 discount; ties count against us."""
    discount = 1.0 / np.log2(np.arange(2, k + 2))

    def one(gain: Floats) -> float:
        top = gain[:k]
        ideal = np.sort(gain)[::-1][:k]
        return float((top * discount[: len(top)]).sum() / (ideal * discount[: len(ideal)]).sum())

    return _per_list(question, score, relevant, questions, one)


def _per_list(
    question: Ints,
    score: npt.ArrayLike,
    relevant: Ints,
    questions: int,
    one: Callable[[Floats], float],
) -> Floats:
    values = np.asarray(score, np.float64)
    if not np.isfinite(values).all():
        raise InputError("passage scores must be finite; a NaN was found. Score the passage again.")
    gain = (relevant == 1).astype(np.float64)
    order = np.lexsort((gain, -values, question))
    result = np.full(questions, np.nan)
    bounds = np.searchsorted(question[order], np.arange(questions + 1))
    for q, (start, end) in enumerate(itertools.pairwise(bounds)):
        gains = gain[order[start:end]]
        if gains.any():
            result[q] = one(gains)
    return result
