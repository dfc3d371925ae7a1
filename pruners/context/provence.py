"""Provence's decision: sentences whose tokens a network wants kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from .. import rules
from ..contract import (
    BoolArray,
    Budget,
    FloatArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_count,
    check_fraction,
    empty_selection,
)

Aggregation = Literal["mean", "vote"]
OnEmpty = Literal["empty", "top1", "original"]

REASONS = (
    "above_threshold",
    "protected",
    "among_best",
    "best_of_empty",
    "whole_passage",
    "title",
    "below_threshold",
    "title_alone",
)
_ABOVE, _PROTECTED, _BEST, _TOP1, _WHOLE, _TITLE, _BELOW, _ALONE = range(len(REASONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Provence:
    """Keep sentences whose mean keep probability exceeds a threshold (Provence, arXiv:2501.16214).

    "mean": score = mean of the tokens' keep probabilities, kept iff score > threshold
    (OpenProvence's rule, and the default). "vote": score = share of tokens whose probability
    exceeds the threshold, kept iff score > 0.5 (the paper, section 3: "sentence rounding"); a
    sentence at exactly half is dropped, as in the paper and unlike OpenProvence's majority.

    A title is kept iff another sentence of its passage is (with `keep_title`; else by its own
    score); in a passage of nothing but a title it is a sentence like any other. Departure: the
    published code takes the first sentence for a title by default; here a row is a title only
    where the signal `title` says so.

    Relations: `dslr` scores each sentence by itself, `cosine` without a cross-encoder,
    `lexrank` without the question.

    Attributes
    ----------
    threshold
        0 to 1; higher keeps less. Fitted for a checkpoint and stored with it; 0.1 is
        Provence's own cautious one.
    aggregation
        "mean" or "vote"; the vote needs the tokens' probabilities
        (`token_keep_probability`, `token_offset`).
    keep_title
        Whether a title follows its passage.
    min_sentences
        At least so many sentences of every passage, titles not counted.
    on_empty
        A passage of which nothing is left: "empty" leaves it so, "top1" keeps its best
        sentence, "original" keeps all of it.
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "passage", "keep_probability"})
    optional: ClassVar[frozenset[str]] = frozenset(
        {"title", "protected", "token_offset", "token_keep_probability"}
    )
    budget: ClassVar[Budget] = Budget("threshold", "threshold")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "passage"
    threshold: float = 0.1
    aggregation: Aggregation = "mean"
    keep_title: bool = True
    min_sentences: int = 0
    on_empty: OnEmpty = "empty"

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)
        check_count("min_sentences", self.min_sentences)
        for name, known in (("aggregation", Aggregation), ("on_empty", OnEmpty)):
            value, allowed = getattr(self, name), get_args(known)
            if value not in allowed:
                raise InputError(f"`{name}` must be one of {', '.join(allowed)}; found {value!r}.")

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing or not finite."""
        score, cut = self._score(signals)
        if not len(score):
            return empty_selection(REASONS)
        ids = signals["id"]
        _, group = np.unique(signals["passage"], return_inverse=True)
        title = _body_or_title(_flags(signals, "title"), group)
        protected = _flags(signals, "protected")
        reason = np.full(len(score), _BELOW, np.uint8)
        body_group = np.where(title, -1, group)
        rank = rules.rank_in_group(score, ids, body_group)
        rank[title] = np.iinfo(np.int64).max
        reason[rank < self.min_sentences] = _BEST
        reason[rules.above(score, cut)] = _ABOVE
        reason[protected] = _PROTECTED
        # A title does not fill its passage: what counts is whether anything else is left.
        empty = ~_any_by_group((reason < _BELOW) & ~title, group)
        if self.on_empty == "top1":
            reason[empty[group] & (rank == 0)] = _TOP1
        elif self.on_empty == "original":
            reason[empty[group] & (reason == _BELOW)] = _WHOLE
        if self.keep_title:
            filled = _any_by_group((reason < _BELOW) & ~title, group)[group]
            reason[title & ~protected & filled] = _TITLE
            reason[title & ~protected & ~filled] = _ALONE
        threshold = np.full(len(score), cut, np.float32)
        return Selection(reason < _BELOW, score, reason, REASONS, threshold)

    def _score(self, signals: Signals) -> tuple[FloatArray, float]:
        if self.aggregation == "mean":
            signals.require(self.needs)
            return signals["keep_probability"], self.threshold
        signals.require(self.needs | {"token_offset", "token_keep_probability"})
        return vote(signals["token_keep_probability"], signals["token_offset"], self.threshold), 0.5


def vote(token: FloatArray, offset: npt.NDArray[np.int64], threshold: float) -> FloatArray:
    """Share of each sentence's tokens with probability > threshold, (S,) float32; 0 for none."""
    counted = np.concatenate([[0], np.cumsum(rules.above(token, threshold))])
    sizes = np.diff(offset)
    return np.asarray(
        (counted[offset[1:]] - counted[offset[:-1]]) / np.maximum(sizes, 1), np.float32
    )


def _flags(signals: Signals, name: str) -> BoolArray:
    if name in signals:
        return np.asarray(signals[name], np.bool_)
    return np.zeros(signals.n, np.bool_)


def _body_or_title(title: BoolArray, group: npt.NDArray[np.int64]) -> BoolArray:
    """Titles, except where the passage holds nothing else."""
    return np.asarray(title & _any_by_group(~title, group)[group], np.bool_)


def _any_by_group(flag: BoolArray, group: npt.NDArray[np.int64]) -> BoolArray:
    return np.bincount(group, weights=flag, minlength=int(group.max(initial=-1)) + 1) > 0
