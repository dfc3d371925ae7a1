"""Haystack: a component that reranks documents and prunes their sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret, deserialize_secrets_inplace

from .engine import Choice, Engine, OnEmpty, OnError, titles_of

_PLAIN = (
    "model",
    "url",
    "threshold",
    "top_k",
    "max_tokens",
    "min_sentences",
    "title_key",
    "on_empty",
    "on_error",
    "timeout",
)


@component
class PruneryPruner:
    """Gives back the documents by relevance with only the sentences that answer the query.

    Documents are copied: ids and meta stay; `compression` and `kept_spans` (places in the text
    before) are added to meta, and `score` is the relevance. Documents without text (images) are
    passed on behind the others as they are. Of documents with equal ids the one with the best
    score before is taken.

    Haystack 3 reads a pipeline with it from YAML with
    `Pipeline.loads(text, allowed_modules=["prunery.api.adapters.haystack"])`.
    """

    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        key: Secret | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        min_sentences: int = 0,
        title_key: str | None = None,
        on_empty: OnEmpty = "drop",
        on_error: OnError = "raise",
        timeout: float = 60.0,
    ) -> None:
        """Take the options; nothing is loaded before `warm_up`.

        Parameters
        ----------
        model
            "default", a folder or a hub id; with `url`, a name of that service.
        url, key
            A service to ask instead, and its API key.
        threshold, top_k, max_tokens, min_sentences
            As in `ContextPruner.prune`.
        title_key
            Key of meta that holds a document's title.
        on_empty
            A document of which nothing is left: "drop", "empty", "top1" or "original".
        on_error
            A document without a score: "raise", or "keep" it whole behind the others.
        timeout
            Seconds for one request to the service.
        """
        _check_top_k(top_k)
        self.model = model
        self.url = url
        self.key = key
        self.threshold = threshold
        self.top_k = top_k
        self.max_tokens = max_tokens
        self.min_sentences = min_sentences
        self.title_key = title_key
        self.on_empty = on_empty
        self.on_error = on_error
        self.timeout = timeout
        self._engine: Engine | None = None

    def warm_up(self) -> None:
        """Load the model, or open the client; `run` does so too."""
        self._ready().warm_up()

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's YAML; the key itself is never written, only where it comes from."""
        key = None if self.key is None else self.key.to_dict()
        made: dict[str, Any] = default_to_dict(
            self, key=key, **{name: getattr(self, name) for name in _PLAIN}
        )
        return made

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneryPruner:
        """The inverse of `to_dict`."""
        if data["init_parameters"].get("key") is not None:
            deserialize_secrets_inplace(data["init_parameters"], keys=["key"])
        made: PruneryPruner = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
    ) -> dict[str, list[Document]]:
        """Rerank and prune; options given here come before those of the component."""
        _check_top_k(top_k)
        texts, others = _distinct(documents)
        made = self._ready().prune(
            query,
            [one.content or "" for one in texts],
            titles_of([one.meta for one in texts], self.title_key),
            **_changes(top_k, threshold, max_tokens),
        )
        return {"documents": [_document(texts[one.index], one) for one in made] + others}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
    ) -> dict[str, list[Document]]:
        """As `run`, without holding up the event loop."""
        _check_top_k(top_k)
        texts, others = _distinct(documents)
        made = await self._ready().aprune(
            query,
            [one.content or "" for one in texts],
            titles_of([one.meta for one in texts], self.title_key),
            **_changes(top_k, threshold, max_tokens),
        )
        return {"documents": [_document(texts[one.index], one) for one in made] + others}

    def _ready(self) -> Engine:
        if self._engine is None:
            self._engine = Engine.of(self, None if self.key is None else self.key.resolve_value())
        return self._engine


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k <= 0:
        raise ValueError(f"top_k must be above 0; found {top_k}.")


def _changes(
    top_k: int | None, threshold: float | None, max_tokens: int | None
) -> dict[str, int | float]:
    given = {"top_k": top_k, "threshold": threshold, "max_tokens": max_tokens}
    return {name: value for name, value in given.items() if value is not None}


def _distinct(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """One document an id, in order of appearance: those with text, and those without."""
    best: dict[str, Document] = {}
    for one in documents:
        known = best.get(one.id)
        if known is None or _score(one) > _score(known):
            best[one.id] = one
    texts = [one for one in best.values() if one.content is not None]
    return texts, [one for one in best.values() if one.content is None]


def _score(document: Document) -> float:
    return float("-inf") if document.score is None else document.score


def _document(before: Document, one: Choice) -> Document:
    note = {name: value for name, value in one.note.items() if name != "relevance_score"}
    meta = {**before.meta, **note}
    return dataclasses.replace(before, content=one.text, score=one.relevance, meta=meta)
