"""What the rerank dialects share: scoring, order, and pruning where it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError, ModelError, PruneryError
from ..pruners.context.options import PruneOptions
from ..pruners.context.result import PrunedPassage, ScoredPassage, decide
from .errors import TooLarge
from .patterns import linear_patterns
from .served import SMALL, Scores, ServedModel
from .settings import Limits

if TYPE_CHECKING:
    from ..pruners.context.packing import TokenSource

Texts = Annotated[list[str], Field(fail_fast=True)]
"""Strings; the first that is none ends the check, however many follow."""
Document = str | dict[str, Any]
Documents = Annotated[list[Document], Field(fail_fast=True)]


class Dialect(BaseModel):
    """A body of another server's dialect: keys that it does not know are passed over, as there."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class PruneExtra(BaseModel):
    """Opt-in key `prune` of a rerank request: options of `ContextPruner.prune`.

    Results then hold `pruned_text`, `compression_rate` (percent of characters removed) and
    `sentences`. `top_n` stands for `top_k`; a budget is spent among the results given back.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    aggregation: Literal["mean", "vote"] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_sentences: int = Field(0, ge=0)
    keep_title: bool = True
    protect: Texts = []
    on_empty: Literal["empty", "top1", "original"] = "empty"
    titles: (
        Annotated[list[str | None], Field(fail_fast=True)] | Literal["first_sentence"] | None
    ) = None

    def options(self, top_n: int | None, limits: Limits) -> PruneOptions:
        """The same as `PruneOptions`; raises TooLarge for more patterns than are allowed."""
        if len(self.protect) > limits.patterns:
            raise TooLarge(f"`protect` has {len(self.protect)} patterns; {limits.patterns} may be.")
        return PruneOptions(
            threshold=self.threshold,
            aggregation=self.aggregation,
            top_k=top_n,
            max_tokens=self.max_tokens,
            min_sentences=self.min_sentences,
            keep_title=self.keep_title,
            protect=linear_patterns(self.protect),
            on_empty=self.on_empty,
        )


@dataclass(frozen=True, slots=True)
class Ranking:
    """Passages by relevance, highest first, ties by place; and those that have no score.

    Attributes
    ----------
    ranked
        The first `top_n`.
    pruned
        Their pruned forms in the same order; None where pruning was not asked for.
    failed
        Place and error.
    scores
        As the model gave them, with times and tokens.
    """

    ranked: Sequence[ScoredPassage]
    pruned: Sequence[PrunedPassage] | None
    failed: Sequence[tuple[int, PruneryError]]
    scores: Scores

    def extras(self, rank: int) -> dict[str, Any]:
        """The opt-in keys of one result."""
        if self.pruned is None:
            return {}
        one = self.pruned[rank]
        return {
            "pruned_text": one.text,
            "compression_rate": 100.0 * one.compression,
            "sentences": [
                {"start": s.start, "end": s.end, "score": s.score, "kept": s.kept}
                for s in one.sentences
            ],
        }

    def errors(self) -> list[dict[str, Any]]:
        """The failed passages, for dialects whose answer is an object."""
        return [{"index": index, "message": str(error)} for index, error in self.failed]


async def rank(
    served: ServedModel,
    question: str,
    texts: Sequence[str],
    *,
    top_n: int | None,
    prune: PruneExtra | None,
    limits: Limits,
) -> Ranking:
    """Score and order texts; prune the first `top_n` where `prune` is given.

    Raises
    ------
    ModelError
        Not one text has a score.
    PruneryError
        What `ServedModel.score` and `decide` raise.
    """
    options = None if prune is None else prune.options(top_n, limits)
    titles = None if prune is None else prune.titles
    scores = await served.score(question, texts, titles=titles)
    fine: list[ScoredPassage] = []
    failed: list[tuple[int, PruneryError]] = []
    for index, one in enumerate(scores.passages):
        if isinstance(one, PruneryError):
            failed.append((index, one))
        else:
            fine.append(one)
    if failed and not fine:
        raise failed[0][1]
    fine.sort(key=lambda one: (-one.relevance_logit, one.index))
    ranked = fine[:top_n]
    if options is None:
        return Ranking(ranked, None, failed, scores)
    if len(texts) <= SMALL and not options.protect:
        pruned = decide(ranked, options)[0]
    else:
        pruned = (await asyncio.to_thread(decide, ranked, options))[0]
    return Ranking(ranked, pruned, failed, scores)


def all_scored(ranking: Ranking) -> None:
    """Raise ModelError naming the texts without a score, for a dialect with no place for them."""
    if ranking.failed:
        places = ", ".join(str(index) for index, _ in ranking.failed[:20])
        raise ModelError(
            f"{len(ranking.failed)} of {len(ranking.scores.passages)} texts have no score"
            f" (places {places}): {ranking.failed[0][1]} Send the others without them, or ask"
            " with `prune`, which lists errors beside results."
        )


def texts_of(documents: Sequence[Document], fields: Sequence[str] | None = None) -> list[str]:
    """The text of each document: itself, or its fields `text` (or `fields`), a line each.

    Raises InputError for an object that has none of them as a string.
    """
    wanted = tuple(fields) if fields else ("text",)
    return [
        one if isinstance(one, str) else _field_text(number, one, wanted)
        for number, one in enumerate(documents)
    ]


def _field_text(number: int, document: dict[str, Any], wanted: Sequence[str]) -> str:
    found = [document[name] for name in wanted if isinstance(document.get(name), str)]
    if not found:
        names = " or ".join(f"`{name:.40}`" for name in wanted[:5])
        raise InputError(
            f"documents[{number}] must be a string, or an object with a string {names}."
        )
    return "\n".join(found)


async def cut_to_tokens(served: ServedModel, texts: list[str], most: int | None) -> list[str]:
    """Each text up to its `most`-th token of the served model; None leaves them whole."""
    # No tokenizer here makes more tokens of a text than it has bytes.
    if most is None or all(len(text.encode()) <= most for text in texts):
        return texts
    return await asyncio.to_thread(_cut_all, served.scorer.source, texts, most)


def _cut_all(source: TokenSource, texts: Sequence[str], most: int) -> list[str]:
    from ..pruners.context.sentences import split_sentences

    made = []
    for text in texts:
        spans = split_sentences(text)
        left = most
        end = len(text)
        for (start, stop), ids in zip(
            spans, source.encode([text[a:b] for a, b in spans]), strict=True
        ):
            if len(ids) > left:
                end = start + _longest_fit(source, text[start:stop], left)
                break
            left -= len(ids)
        made.append(text[:end])
    return made


def _longest_fit(source: TokenSource, sentence: str, most: int) -> int:
    """Most characters of a sentence that take at most so many tokens, by halving."""
    low, high = 0, len(sentence)
    while low < high:
        middle = (low + high + 1) // 2
        if len(source.encode([sentence[:middle]])[0]) <= most:
            low = middle
        else:
            high = middle - 1
    return low
