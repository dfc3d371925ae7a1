"""The arithmetic of context-pruning quality: arrays in, numbers out; no model, no I/O.

Every decision rule here is "keep a sentence when its score reaches a level", so a question's
evidence (or its answer string) is kept exactly while the level does not exceed one number: the
lowest score among the sentences that it needs. A whole curve over thresholds, or its value at an
exact share of characters removed, is then one sort and one cumulative sum. The best-k rule is the
same rule over another score, minus the rank inside the passage.

Figures of one fixed decision (F-beta, positions), of scores alone (AUROC, calibration) and of
ranked passages are in `sentence_metrics`. Intervals are percentile intervals of a
bootstrap over questions (Efron and Tibshirani 1993, chapter 13); all methods share the resamples,
so that their differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: Resamples handled at once, so that memory stays at CHUNK x sentences x 8 bytes.
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Labelled:
    """N sentences of P passages of Q questions, flat; a passage's sentences adjoin, in order.

    Attributes
    ----------
    passage
        (N,) int64, index of the sentence's passage, 0..P-1, never decreasing.
    question
        (P,) int64, index of the passage's question, 0..Q-1.
    chars
        (N,) int64, characters of the sentence.
    label
        (N,) int64, 1 evidence, 0 not evidence, -1 unknown.
    relevant
        (P,) int64, 1 the passage answers its question, 0 it does not, -1 unknown.
    span_question, span_first, span_last
        (A,) int64, occurrences of an answer string: the question, and the first and last
        sentence (both inclusive) that the occurrence touches.
    questions
        Q, the number of questions (a question may have no sentence left).
    """

    passage: Ints
    question: Ints
    chars: Ints
    label: Ints
    relevant: Ints
    span_question: Ints
    span_first: Ints
    span_last: Ints
    questions: int

    def __post_init__(self) -> None:
        n, p = len(self.passage), len(self.question)
        for name, length in (("chars", n), ("label", n), ("relevant", p)):
            if len(getattr(self, name)) != length:
                raise InputError(
                    f"`{name}` must have {length} entries; found {len(getattr(self, name))}."
                    " Flatten all columns from the same rows."
                )
        steps = np.diff(self.passage)
        if n and (self.passage[0] != 0 or self.passage[-1] != p - 1 or steps.min(initial=0) < 0):
            raise InputError(
                f"`passage` must run from 0 to {p - 1} without decreasing; found"
                f" {self.passage[0]}..{self.passage[-1]}. Sort sentences by passage."
            )
        if steps.max(initial=0) > 1 or (n == 0 and p):
            raise InputError("every passage needs at least one sentence; drop the empty ones.")

    @property
    def owner(self) -> Ints:
        """(N,) int64, the question of each sentence."""
        return self.question[self.passage]

    @property
    def position(self) -> Ints:
        """(N,) int64, place of the sentence in its passage, from 0."""
        starts = np.searchsorted(self.passage, np.arange(len(self.question)))
        return np.asarray(np.arange(len(self.passage)) - starts[self.passage], dtype=np.int64)

    @property
    def size(self) -> Ints:
        """(P,) int64, sentences of each passage."""
        return np.bincount(self.passage, minlength=len(self.question)).astype(np.int64)


def rank_in_passage(data: Labelled, score: npt.ArrayLike) -> Ints:
    """(N,) int64, 0 for the best sentence of its passage; ties go to the earlier sentence."""
    values = np.asarray(score, dtype=np.float64)
    order = np.lexsort((np.arange(len(values)), -values, data.passage))
    rank = np.empty(len(values), np.int64)
    rank[order] = data.position  # the sorted rows fill each passage's places in order
    return rank


def evidence_level(data: Labelled, score: npt.ArrayLike) -> Floats:
    """(Q,) float64, the highest level at which all evidence of a question is kept.

    NaN where a question has no evidence sentence.
    """
    return _lowest(np.asarray(score, np.float64), data.label == 1, data.owner, data.questions)


def answer_level(data: Labelled, score: npt.ArrayLike) -> Floats:
    """(Q,) float64, the highest level at which some occurrence of the answer is kept whole.

    An occurrence that touches several sentences needs all of them. NaN where the answer does
    not occur in the question's passages at all.
    """
    values = np.asarray(score, dtype=np.float64)
    level = np.full(data.questions, -np.inf)
    if len(data.span_first):
        starts = np.empty(2 * len(data.span_first), np.int64)
        starts[0::2], starts[1::2] = data.span_first, data.span_last + 1
        padded = np.append(values, np.inf)
        np.maximum.at(level, data.span_question, np.minimum.reduceat(padded, starts)[0::2])
    seen = np.zeros(data.questions, np.bool_)
    seen[data.span_question] = True
    return np.where(seen, level, np.nan)


def _lowest(score: Floats, mask: Bools, owner: Ints, questions: int) -> Floats:
    level = np.full(questions, np.inf)
    np.minimum.at(level, owner[mask], score[mask])
    return np.where(np.isfinite(level), level, np.nan)


def bootstrap_weights(questions: int, resamples: int, seed: int) -> Ints:
    """(resamples, questions) int64: how often each question is drawn in each resample."""
    if not questions:
        return np.zeros((resamples, 0), np.int64)
    generator = np.random.default_rng(seed)
    return generator.multinomial(questions, np.full(questions, 1 / questions), size=resamples)


@dataclass(frozen=True, slots=True)
class Curve:
    """Levels in falling order, the characters kept at each and the questions kept at each.

    Point 0 keeps nothing (level +inf); the last point keeps everything.
    """

    level: Floats  # (M+1,)
    removed: Floats  # (M+1,) share of characters removed, 1 falls to 0
    value: Floats  # (M+1,) share of questions kept, 0 rises to 1


class Sweep:
    """One score over one set of sentences, sorted once; every question about it is a look-up.

    Parameters
    ----------
    data
        The sentences.
    score
        (N,) float, higher = kept longer; must be finite.
    event
        (Q,) float, level up to which a question counts as kept (`evidence_level` or
        `answer_level`); NaN leaves the question out of the share, its characters still count.
    """

    def __init__(self, data: Labelled, score: npt.ArrayLike, event: npt.ArrayLike) -> None:
        values = np.asarray(score, dtype=np.float64)
        if values.shape != data.passage.shape or not np.isfinite(values).all():
            raise InputError(
                f"scores must be finite and have shape {data.passage.shape}; found shape"
                f" {values.shape} with {int((~np.isfinite(values)).sum())} non-finite."
            )
        order = np.argsort(-values, kind="stable")
        ranked = values[order]
        self._ends = (
            np.flatnonzero(np.append(np.diff(ranked) != 0, True))
            if len(ranked)
            else (np.zeros(0, np.int64))
        )
        self._levels = np.append(np.inf, ranked[self._ends])
        self._chars, self._owner = data.chars[order].astype(np.float64), data.owner[order]
        events = np.asarray(event, dtype=np.float64)
        known = np.flatnonzero(~np.isnan(events))
        self._known = known[np.argsort(-events[known], kind="stable")]
        # Questions kept at level j: those whose event is at least levels[j].
        self._kept_at = np.searchsorted(-events[self._known], -self._levels, side="right")
        self._questions = data.questions

    @property
    def counted(self) -> int:
        """Questions that the share is taken over."""
        return len(self._known)

    def curve(self) -> Curve:
        """The whole curve, every achievable level a point."""
        removed, value = self._points(np.ones((1, self._questions), np.int64))
        return Curve(self._levels, removed[0], value[0])

    def at_removed(self, targets: Sequence[float], weights: Ints | None = None) -> Floats:
        """Share of questions kept when exactly a target share of the characters is removed.

        Linear between the two nearest achievable levels (tied sentences are one level). Shape
        (B, targets): one row a resample of `weights` (B, Q), or one row without them.
        """
        found = []
        for part in self._parts(weights):
            removed, value = self._points(part)
            found.append(np.stack([_between(removed, value, t) for t in targets], axis=1))
        return np.concatenate(found)

    def at_levels(
        self, levels: Sequence[float], weights: Ints | None = None
    ) -> tuple[Floats, Floats]:
        """(removed, value) when sentences scoring at least a level are kept; (B, levels) each."""
        index = np.searchsorted(-self._levels, -np.asarray(levels, np.float64), side="right") - 1
        removed, value = [], []
        for part in self._parts(weights):
            a, b = self._points(part)
            removed.append(a[:, index])
            value.append(b[:, index])
        return np.concatenate(removed), np.concatenate(value)

    def level_at(self, target: float) -> float:
        """The achievable level whose share removed comes nearest to `target`."""
        curve = self.curve()
        return float(curve.level[int(np.argmin(np.abs(curve.removed - target)))])

    def _parts(self, weights: Ints | None) -> list[Ints]:
        if weights is None:
            return [np.ones((1, self._questions), np.int64)]
        return [weights[i : i + CHUNK] for i in range(0, len(weights), CHUNK)]

    def _points(self, weights: Ints) -> tuple[Floats, Floats]:
        chars = np.cumsum(weights[:, self._owner] * self._chars, axis=1)
        total = chars[:, -1:] if chars.shape[1] else np.zeros((len(weights), 1))
        kept = np.concatenate([np.zeros((len(weights), 1)), chars[:, self._ends]], axis=1)
        removed = 1.0 - kept / np.where(total > 0, total, 1.0)
        drawn = np.concatenate(
            [np.zeros((len(weights), 1)), np.cumsum(weights[:, self._known], axis=1)], axis=1
        )
        whole = np.where(drawn[:, -1:] > 0, drawn[:, -1:], np.nan)
        return removed, drawn[:, self._kept_at] / whole


def _between(removed: Floats, value: Floats, target: float) -> Floats:
    upper = np.minimum((removed > target).sum(axis=1), removed.shape[1] - 1)
    lower = np.maximum(upper - 1, 0)
    rows = np.arange(len(removed))
    high, low = removed[rows, lower], removed[rows, upper]
    gap = np.where(high > low, high - low, 1.0)
    share = np.clip((high - target) / gap, 0.0, 1.0)
    a, b = value[rows, lower], value[rows, upper]
    between: Floats = a + (b - a) * share
    return between


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its percentile interval; None where nothing could be measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0


def interval(value: float, resampled: npt.ArrayLike, n: int, *, level: float = 0.95) -> Interval:
    """Percentile interval of the resampled values; resamples with nothing to count are left out."""
    if not np.isfinite(value) or not n:
        return Interval(None, n=n)
    draws = np.asarray(resampled, dtype=np.float64)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Interval(float(value), n=n)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high), n)


def question_mean(values: npt.ArrayLike, weights: Ints) -> Interval:
    """Mean over questions of a per-question figure (NaN = not counted), with its interval."""
    figures = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(figures)
    if not known.any():
        return Interval(None)
    drawn = weights[:, known].sum(axis=1)
    means = weights[:, known] @ figures[known] / np.where(drawn > 0, drawn, np.nan)
    return interval(float(figures[known].mean()), means, int(known.sum()))


def flatten_ids(groups: Sequence[str]) -> tuple[Ints, list[str]]:
    """Index of each group among the sorted distinct groups, and those groups.

    Sorted, so that resamples do not depend on the order of the rows.
    """
    names = sorted(set(groups))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[g] for g in groups], dtype=np.int64), names
