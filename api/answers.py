"""What a service answers, as dataclasses for its clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import BudgetError, InputError, ModelError, PruneryError
from ..pipelines.openai_calls import retry_after
from .errors import (
    Busy,
    NotServed,
    ServiceError,
    Stopping,
    TimedOut,
    TooLarge,
    Unauthorised,
    Upstream,
)


class RemoteSentence(NamedTuple):
    """passage[start:end], its score 0..1, whether it stays, and why."""

    start: int
    end: int
    score: float
    kept: bool
    reason: str


@dataclass(frozen=True, slots=True)
class RemotePassage:
    """A passage after pruning: the fields of `PrunedPassage`, and the id it was sent with."""

    text: str
    index: int
    relevance: float
    relevance_logit: float
    sentences: tuple[RemoteSentence, ...]
    chars_in: int
    chars_out: int
    tokens_in: int
    tokens_out: int
    compression: float
    blocks: int
    title_kept: bool
    truncated: bool
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class FailedPassage:
    """A passage that has no score, and why."""

    index: int
    kind: str
    message: str
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class PruneAnswer:
    """Pruned passages by relevance, highest first; those without a score apart."""

    model: str
    threshold: float
    results: tuple[RemotePassage, ...]
    failed: tuple[FailedPassage, ...]
    usage: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """Place in the list that was sent, and relevance 0..1."""

    index: int
    relevance: float


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """Passages by relevance, highest first; those without a score apart."""

    model: str
    results: tuple[RankedPassage, ...]
    failed: tuple[FailedPassage, ...]


def prune_answer(made: Any) -> PruneAnswer:
    """Read the answer of POST /v1/prune; raises Upstream where it is something else."""
    try:
        fine = [_passage(one) for one in made["results"] if "error" not in one]
        failed = [
            FailedPassage(
                one["index"], one["error"]["type"], one["error"]["message"], one.get("id")
            )
            for one in made["results"]
            if "error" in one
        ]
        return PruneAnswer(
            made["model"], made["threshold"], tuple(fine), tuple(failed), made["usage"]
        )
    except (KeyError, TypeError) as error:
        raise _foreign(error) from error


def _passage(one: Mapping[str, Any]) -> RemotePassage:
    names = RemotePassage.__slots__
    plain = {name: one[name] for name in names if name not in ("sentences", "id")}
    fields = RemoteSentence._fields
    sentences = [RemoteSentence(*(s[name] for name in fields)) for s in one.get("sentences", ())]
    return RemotePassage(sentences=tuple(sentences), id=one.get("id"), **plain)


def rerank_answer(made: Any) -> RerankAnswer:
    """Read the answer of POST /v1/rerank; raises Upstream where it is something else."""
    try:
        ranked = [RankedPassage(one["index"], one["relevance_score"]) for one in made["results"]]
        failed = [
            FailedPassage(one["index"], "model", one["message"]) for one in made.get("errors", ())
        ]
        return RerankAnswer(made["model"], tuple(ranked), tuple(failed))
    except (KeyError, TypeError) as error:
        raise _foreign(error) from error


def _foreign(error: Exception) -> Upstream:
    return Upstream(f"the answer is not of a Prunery service ({error!r}); check the URL.")


_CHILDREN: Mapping[int, type[ServiceError]] = {
    401: Unauthorised,
    404: NotServed,
    413: TooLarge,
    502: Upstream,
    503: Stopping,
    504: TimedOut,
}


def error_of(status: int, text: str, headers: Mapping[str, str]) -> PruneryError:
    """The error that a failed answer stands for, in the service's words."""
    kind, message = _said(text)
    message = f"{message} (HTTP {status})"
    if status == 429:
        return Busy(message, retry_after(headers.get("Retry-After")) or 1.0)
    if status in _CHILDREN:
        return _CHILDREN[status](message)
    if status == 424:
        return ModelError(message)
    if 400 <= status < 500:
        return BudgetError(message) if kind == "budget" else InputError(message)
    return ServiceError(message)


def _said(text: str) -> tuple[str, str]:
    try:
        made = json.loads(text)
    except ValueError:
        return "", text[:500] or "no explanation"
    if isinstance(made, dict):
        error = made.get("error")
        if isinstance(error, dict):
            return str(error.get("type", "")), str(error.get("message", error))[:2000]
        found = error or made.get("detail") or made.get("message")
        if isinstance(found, str):
            return "", found[:2000]
    return "", text[:500]
