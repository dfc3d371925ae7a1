"""POST /v1/prune: one question's passages, reranked and pruned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from ..errors import InputError, PruneryError
from ..pruners.context.options import PruneOptions
from ..pruners.context.result import PrunedPassage, ScoredPassage, decide
from .errors import TooLarge, status_of
from .patterns import linear_patterns
from .prune_schemas import ErrorBody, Passage, PruneRequest, PruneResponse
from .served import SMALL, Scores, ServedModel
from .service import Service

router = APIRouter(prefix="/v1", tags=["prune"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    413: {"model": ErrorBody, "description": "Past a limit; the message says which."},
    422: {"model": ErrorBody, "description": "The body is not as described."},
    424: {"model": ErrorBody, "description": "The network failed on this request."},
    429: {"model": ErrorBody, "description": "Too much waits; `Retry-After` says for how long."},
    503: {"model": ErrorBody, "description": "Starting or stopping."},
    504: {"model": ErrorBody, "description": "No result in time; the work was dropped."},
}


@router.post(
    "/prune",
    summary="Rerank and prune passages",
    response_model=PruneResponse,
    responses=_ERRORS,
)
async def prune(request: Request, body: PruneRequest) -> Response:
    """Score every passage against the question in one pass, and keep the sentences that answer."""
    service: Service = request.app.state.service
    served = service.model(body.model)
    options = _options(body, service.settings.limits.patterns)
    texts, titles = _texts(body)
    scores = await served.score(body.question, texts, titles=titles)
    if len(texts) <= SMALL and not options.protect:
        content = _answer(body, served, scores, options)
    else:
        content = await asyncio.to_thread(_answer, body, served, scores, options)
    return Response(content, media_type="application/json")


def _options(body: PruneRequest, most: int) -> PruneOptions:
    if len(body.protect) > most:
        raise TooLarge(f"`protect` has {len(body.protect)} patterns; {most} are allowed.")
    return PruneOptions(
        threshold=body.threshold,
        aggregation=body.aggregation,
        top_k=body.top_k,
        max_tokens=body.max_tokens,
        min_sentences=body.min_sentences,
        keep_title=body.keep_title,
        protect=linear_patterns(body.protect),
        on_empty=body.on_empty,
    )


def _texts(body: PruneRequest) -> tuple[list[str], Any]:
    texts = [one.text if isinstance(one, Passage) else one for one in body.passages]
    own = [one.title if isinstance(one, Passage) else None for one in body.passages]
    if not any(title is not None for title in own):
        return texts, body.titles
    if body.titles is not None:
        raise InputError("titles are given both in `titles` and in `passages`; give them once.")
    return texts, own


def _answer(
    body: PruneRequest, served: ServedModel, scores: Scores, options: PruneOptions
) -> bytes:
    fine = [one for one in scores.passages if not isinstance(one, PruneryError)]
    pruned = decide(fine, options)[0] if fine else []
    results = [_result(one, body) for one in pruned]
    for index, one in enumerate(scores.passages):
        if isinstance(one, PruneryError):
            results.append(_failed(index, one, body))
    asked = options.method(served.config.threshold, served.config.aggregation)
    made = {
        "model": served.name,
        "threshold": asked.threshold,
        "aggregation": asked.aggregation,
        "results": results,
        "usage": _usage(fine, pruned, scores),
    }
    return orjson.dumps(made)


def _usage(
    fine: Sequence[ScoredPassage], pruned: Sequence[PrunedPassage], scores: Scores
) -> dict[str, Any]:
    return {
        "tokens_in": sum(len(one.token_keep_probability) for one in fine),
        "tokens_out": sum(one.tokens_out for one in pruned),
        "model_tokens": scores.tokens,
        "blocks": scores.blocks,
        "tokenise_seconds": scores.tokenise_seconds,
        "queue_seconds": scores.queue_seconds,
        "inference_seconds": scores.inference_seconds,
    }


def _named(index: int, body: PruneRequest) -> dict[str, Any]:
    given = body.passages[index]
    if isinstance(given, Passage) and given.id is not None:
        return {"index": index, "id": given.id}
    return {"index": index}


def _failed(index: int, error: PruneryError, body: PruneRequest) -> dict[str, Any]:
    failure = {"type": status_of(error)[1], "message": str(error)}
    return {**_named(index, body), "error": failure}


def _result(one: PrunedPassage, body: PruneRequest) -> dict[str, Any]:
    made = {
        **_named(one.index, body),
        "text": one.text,
        "relevance": one.relevance,
        "relevance_logit": one.relevance_logit,
        "compression": one.compression,
        "tokens_in": one.tokens_in,
        "tokens_out": one.tokens_out,
        "chars_in": one.chars_in,
        "chars_out": one.chars_out,
        "blocks": one.blocks,
        "truncated": one.truncated,
        "title_kept": one.title_kept,
    }
    if body.return_scores:
        made["title_score"] = one.scored.title_keep_probability
        made["title_tokens"] = one.scored.title_tokens
    if body.sentences:
        made["sentences"] = _sentences(one, body.return_scores)
    return made


def _sentences(one: PrunedPassage, with_tokens: bool) -> list[dict[str, Any]]:
    listed = [sentence._asdict() for sentence in one.sentences]
    if with_tokens:
        offset = one.scored.token_offset.tolist()
        for place, sentence in enumerate(listed):
            sentence["tokens"] = offset[place + 1] - offset[place]
    return listed
