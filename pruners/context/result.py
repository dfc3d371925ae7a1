"""Pruned passages, and the decision that makes them out of stored scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ...errors import InputError
from ..contract import BoolArray, FloatArray, IntArray, Selection, Signals
from .budget import fit_tokens
from .options import PruneOptions
from .provence import Aggregation

OVER_BUDGET = "over_budget"
_OPTION_NAMES = frozenset(option.name for option in fields(PruneOptions))


class PrunedSentence(NamedTuple):
    """One sentence: passage[start:end], its score 0..1 (higher is kept), the verdict and why."""

    start: int
    end: int
    score: float
    kept: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredPassage:
    """What the model said about one passage, enough to decide again without it.

    `starts`, `ends`, `keep_probability` are (S,); `token_offset` (S + 1,) cuts
    `token_keep_probability` (T,). The title is scored apart: `title_tokens` 0 means none.
    With `title_first` the passage's own first sentence is its title.
    """

    question: int
    index: int
    passage: str
    starts: IntArray
    ends: IntArray
    keep_probability: FloatArray
    token_offset: IntArray
    token_keep_probability: FloatArray
    relevance_logit: float
    blocks: int
    truncated: bool
    title: str | None
    title_tokens: int
    title_keep_probability: float
    title_first: bool
    threshold: float
    aggregation: Aggregation

    @property
    def relevance(self) -> float:
        """Sigmoid of the logit, 0..1; exactly 0 for a passage without a token."""
        if not len(self.token_keep_probability):
            return 0.0
        return 0.5 * (1.0 + math.tanh(0.5 * self.relevance_logit))


@dataclass(frozen=True, slots=True)
class PrunedPassage:
    """A passage after pruning.

    Attributes
    ----------
    text
        The kept sentences, sliced from the passage and joined as they stood; "" where nothing
        is left. A title given apart is never part of it.
    index
        Place of the passage in the list that was given.
    relevance, relevance_logit
        The ranking head's score of (question, passage): sigmoid, 0..1, and raw. A passage
        without a single token was not read: relevance 0, logit -100, blocks 0.
    sentences
        All sentences in order, with score, verdict and reason; they cover the passage.
    chars_in, chars_out, tokens_in, tokens_out
        Lengths of passage and text; tokens are those of the model's tokenizer, sentence by
        sentence, without special tokens.
    compression
        Share of characters removed, 0..1; 0 for an empty passage.
    blocks
        Windows that the passage took.
    title_kept
        Whether the title, given apart or as the first sentence, stays.
    truncated
        The question or the title was cut to fit the window; passages never are.
    threshold
        What the sentences were held against (0.5 for the vote).
    """

    text: str
    index: int
    relevance: float
    relevance_logit: float
    sentences: tuple[PrunedSentence, ...]
    chars_in: int
    chars_out: int
    tokens_in: int
    tokens_out: int
    compression: float
    blocks: int
    title_kept: bool
    truncated: bool
    threshold: float
    scored: ScoredPassage = field(repr=False, compare=False)
    options: PruneOptions = field(repr=False, compare=False)

    def rethreshold(self, **changes: Any) -> PrunedPassage:
        """Decide again without the model: options as in `ContextPruner.prune`.

        Options not named stay as they were. `max_tokens` here is a budget for this passage
        alone; use `rethreshold(results, ...)` for one over a question's passages.
        """
        return rethreshold([self], **changes)[0]


def rethreshold(results: Sequence[PrunedPassage], **changes: Any) -> list[PrunedPassage]:
    """Decide again for the passages of one question, without the model.

    Options are those of `ContextPruner.prune`; options not named stay as they were in
    `results`. `top_k` counts among the passages that are still in the list.

    Raises
    ------
    InputError
        An option is unknown or out of range, or the results are not of one call's question.
    BudgetError
        Protected sentences alone exceed `max_tokens`.
    """
    unknown = sorted(set(changes) - _OPTION_NAMES)
    if unknown:
        raise InputError(f"unknown options {unknown}; known: {sorted(_OPTION_NAMES)}.")
    if not results:
        return []
    if len({result.scored.question for result in results}) > 1:
        raise InputError(
            "the results belong to more than one question; decide again for each one's list."
        )
    scored = [result.scored for result in results]
    return decide(scored, replace(results[0].options, **changes))[0]


def decide(scored: Sequence[ScoredPassage], options: PruneOptions) -> list[list[PrunedPassage]]:
    """Prune scored passages, grouped by question in the order in which questions appear.

    Within a question the passages come by relevance, highest first, ties by index; only the
    first `top_k` are in the list. The budget is spent among those.
    """
    groups: dict[int, list[ScoredPassage]] = {}
    for one in scored:
        groups.setdefault(one.question, []).append(one)
    chosen = [_ranked(group, options.top_k) for group in groups.values()]
    flat = [one for group in chosen for one in group]
    if not flat:
        return [[] for _ in chosen]
    rows = _Rows.of(flat, options)
    method = options.method(flat[0].threshold, flat[0].aggregation)
    selection = method(rows.signals, seed=0)
    cut = method.threshold if method.aggregation == "mean" else 0.5
    keep = selection.keep
    if options.max_tokens is not None:
        keep = _budgeted(rows, selection, chosen, options.max_tokens)
    made = _results(flat, rows, selection, keep, options, cut)
    out, at = [], 0
    for group in chosen:
        out.append(made[at : at + len(group)])
        at += len(group)
    return out


def _ranked(group: list[ScoredPassage], top_k: int | None) -> list[ScoredPassage]:
    ranked = sorted(group, key=lambda one: (-one.relevance_logit, one.index))
    return ranked if top_k is None else ranked[:top_k]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sentences of all passages, each passage's title before them, as signals."""

    signals: Signals
    offset: IntArray  # (P + 1,) rows of each passage
    apart: BoolArray  # (N,) the row is a title given apart

    @classmethod
    def of(cls, flat: Sequence[ScoredPassage], options: PruneOptions) -> _Rows:
        patterns = options.patterns()
        probability, tokens, token_values = [], [], []
        counts, title, apart, protected = [], [], [], []
        for one in flat:
            heads = int(one.title_tokens > 0 and len(one.starts) > 0)
            n = len(one.starts) + heads
            counts.append(n)
            if heads:
                probability.append(np.array([one.title_keep_probability], np.float32))
                tokens.append(np.array([one.title_tokens], np.int64))
                # The title's vote: its mean stands for it, it follows its passage anyway.
                token_values.append(
                    np.full(one.title_tokens, one.title_keep_probability, np.float32)
                )
            probability.append(one.keep_probability)
            tokens.append(np.diff(one.token_offset))
            token_values.append(one.token_keep_probability)
            flags = np.zeros(n, np.bool_)
            flags[:heads] = True
            apart.append(flags.copy())
            flags[: int(one.title_first)] = True
            title.append(flags)
            protected.append(_protected(one, heads, patterns))
        sizes = np.concatenate(tokens)
        rows = int(sum(counts))
        signals = Signals(
            {
                "id": np.arange(rows),
                "passage": np.repeat(np.arange(len(flat)), counts),
                "keep_probability": np.concatenate(probability),
                "tokens": sizes,
                "token_offset": np.concatenate([[0], np.cumsum(sizes)]),
                "token_keep_probability": np.concatenate(token_values),
                "title": np.concatenate(title),
                "protected": np.concatenate(protected),
            }
        )
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(signals, offset, np.concatenate(apart))


def _protected(one: ScoredPassage, heads: int, patterns: Sequence[Any]) -> BoolArray:
    flags = np.zeros(len(one.starts) + heads, np.bool_)
    if not patterns:
        return flags
    for row, (start, end) in enumerate(zip(one.starts, one.ends, strict=True)):
        text = one.passage[start:end]
        flags[heads + row] = any(pattern.search(text) for pattern in patterns)
    return flags


def _budgeted(
    rows: _Rows, selection: Selection, chosen: Sequence[list[ScoredPassage]], limit: int
) -> BoolArray:
    keep = selection.keep.copy()
    signals = rows.signals
    first = 0
    for group in chosen:
        part = slice(int(rows.offset[first]), int(rows.offset[first + len(group)]))
        first += len(group)
        keep[part] = fit_tokens(
            selection.keep[part],
            selection.score[part],
            signals["id"][part],
            signals["tokens"][part],
            signals["passage"][part],
            limit,
            forced=signals["protected"][part],
            title=signals["title"][part],
        )
    return keep


def _results(
    flat: Sequence[ScoredPassage],
    rows: _Rows,
    selection: Selection,
    keep: BoolArray,
    options: PruneOptions,
    cut: float,
) -> list[PrunedPassage]:
    reasons = selection.reason_names()
    tokens = rows.signals["tokens"]
    title = rows.signals["title"]
    made = []
    for number, one in enumerate(flat):
        start, stop = int(rows.offset[number]), int(rows.offset[number + 1])
        body = start + int(rows.apart[start]) if stop > start else start
        kept = keep[body:stop]
        sentences = tuple(
            PrunedSentence(a, b, score, stays, OVER_BUDGET if was and not stays else reasons[row])
            for row, a, b, score, stays, was in zip(
                range(body, stop),
                one.starts.tolist(),
                one.ends.tolist(),
                selection.score[body:stop].tolist(),
                kept.tolist(),
                selection.keep[body:stop].tolist(),
                strict=True,
            )
        )
        text = "".join([one.passage[s.start : s.end] for s in sentences if s.kept])
        chars = len(one.passage)
        made.append(
            PrunedPassage(
                text=text,
                index=one.index,
                relevance=one.relevance,
                relevance_logit=one.relevance_logit,
                sentences=sentences,
                chars_in=chars,
                chars_out=len(text),
                tokens_in=len(one.token_keep_probability),
                tokens_out=int(tokens[body:stop][kept].sum()),
                compression=1.0 - len(text) / chars if chars else 0.0,
                blocks=one.blocks,
                title_kept=bool((title[start:stop] & keep[start:stop]).any()),
                truncated=one.truncated,
                threshold=cut,
                scored=one,
                options=options,
            )
        )
    return made
