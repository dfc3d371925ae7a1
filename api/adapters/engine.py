"""What the adapters share: one way to prune, by a local model or through a service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import InputError, ModelError
from ..answers import FailedPassage, PruneAnswer

if TYPE_CHECKING:
    from ...pruners.context import ContextPruner
    from ..client import Client

OnError = Literal["raise", "keep"]
OnEmpty = Literal["drop", "empty", "top1", "original"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one passage.

    Attributes
    ----------
    index
        Its place in the list that was given.
    text
        The kept sentences; the whole passage where it failed and is kept.
    relevance
        0..1; None where the passage has no score.
    note
        For the document's metadata: `relevance_score`, `compression` (share of characters
        removed) and `kept_spans` ([start, end) in the text before), or `prune_error`.
    """

    index: int
    text: str
    relevance: float | None
    note: Mapping[str, Any]


@dataclass
class Engine:
    """A local model, loaded when first used, or a service; and what to ask of it.

    Attributes
    ----------
    model
        What `ContextPruner.from_pretrained` takes; with `url`, a name of that service (None is
        its first).
    url, key
        Of a service (`prunery serve`) and its API key.
    options
        Of `ContextPruner.prune`, without titles.
    on_empty
        A passage of which nothing is left: "drop" leaves it out; else as in `prune`.
    on_error
        A passage without a score: "raise", or "keep" it whole behind the others.
    timeout
        Seconds for one request to the service.
    """

    model: str | None = None
    url: str | None = None
    key: str | None = None
    options: Mapping[str, Any] | None = None
    on_empty: OnEmpty = "drop"
    on_error: OnError = "raise"
    timeout: float = 60.0

    @classmethod
    def of(cls, adapter: Any, key: str | None) -> Engine:
        """From an adapter's fields, which bear the names of these and of the options."""
        names = ("threshold", "top_k", "max_tokens", "min_sentences")
        return cls(
            model=adapter.model,
            url=adapter.url,
            key=key,
            options={name: getattr(adapter, name) for name in names},
            on_empty=adapter.on_empty,
            on_error=adapter.on_error,
            timeout=adapter.timeout,
        )

    def __post_init__(self) -> None:
        if self.on_empty not in ("drop", "empty", "top1", "original"):
            raise InputError(
                f"`on_empty` must be drop, empty, top1 or original; found {self.on_empty!r}."
            )
        if self.on_error not in ("raise", "keep"):
            raise InputError(f"`on_error` must be raise or keep; found {self.on_error!r}.")
        if self.key is not None and self.url is None:
            raise InputError("an API key is for a service; give its `url` too.")
        self._pruner: ContextPruner | None = None
        self._client: Client | None = None

    def warm_up(self) -> None:
        """Load the model, or open the client; later calls do nothing."""
        if self.url is None and self._pruner is None:
            from ...pruners.context import ContextPruner

            self._pruner = ContextPruner.from_pretrained(self.model or "default")
        elif self.url is not None and self._client is None:
            from ..client import Client

            self._client = Client(self.url, key=self.key, timeout=self.timeout)

    def prune(
        self,
        question: str,
        passages: Sequence[str],
        titles: Sequence[str | None] | None = None,
        **changes: Any,
    ) -> list[Choice]:
        """Passages by relevance, highest first; `changes` override the options.

        Raises
        ------
        PruneryError
            What pruner or client raise; ModelError for a passage without a score.
        """
        if not passages:
            return []
        self.warm_up()
        asked = self._asked(titles, changes)
        if self._client is None:
            assert self._pruner is not None
            pruned = self._pruner.prune(question, passages, **asked)
            return self._choices(passages, pruned, ())
        answer = self._client.prune(question, passages, model=self.model, **asked)
        return self._choices(passages, answer.results, answer.failed)

    async def aprune(
        self,
        question: str,
        passages: Sequence[str],
        titles: Sequence[str | None] | None = None,
        **changes: Any,
    ) -> list[Choice]:
        """As `prune`: a service is asked asynchronously, a local model runs in a thread."""
        if self.url is None or not passages:
            return await asyncio.to_thread(self.prune, question, passages, titles, **changes)
        from ..client import AsyncClient

        # One a call: a client belongs to one event loop, an adapter does not.
        async with AsyncClient(self.url, key=self.key, timeout=self.timeout) as client:
            asked = self._asked(titles, changes)
            answer: PruneAnswer = await client.prune(question, passages, model=self.model, **asked)
        return self._choices(passages, answer.results, answer.failed)

    def _asked(
        self, titles: Sequence[str | None] | None, changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = {**(self.options or {}), **changes}
        asked = {name: value for name, value in given.items() if value is not None}
        asked["on_empty"] = "empty" if self.on_empty == "drop" else self.on_empty
        if titles is not None and any(titles):
            asked["titles"] = list(titles)
        return asked

    def _choices(
        self, passages: Sequence[str], pruned: Sequence[Any], failed: Sequence[FailedPassage]
    ) -> list[Choice]:
        if failed and self.on_error == "raise":
            raise ModelError(
                f"{len(failed)} of {len(passages)} passages have no score; the first,"
                f" {failed[0].index}: {failed[0].message} Say on_error='keep' to go on without."
            )
        made = [
            Choice(one.index, one.text, one.relevance, _note(one))
            for one in pruned
            if one.text or self.on_empty != "drop"
        ]
        for one in failed:
            note = {"prune_error": one.message}
            made.append(Choice(one.index, passages[one.index], None, note))
        return made


def titles_of(metadata: Sequence[Mapping[str, Any]], key: str | None) -> list[str | None] | None:
    """The titles that documents have under a key of their metadata; None without a key."""
    if key is None:
        return None
    found = [one.get(key) for one in metadata]
    return [title if isinstance(title, str) else None for title in found]


def _note(one: Any) -> dict[str, Any]:
    return {
        "relevance_score": one.relevance,
        "compression": one.compression,
        "kept_spans": [[s.start, s.end] for s in one.sentences if s.kept],
    }
