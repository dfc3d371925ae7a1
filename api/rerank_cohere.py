"""POST /v2/rerank as Cohere answers it, relevant spans included.

Departures: documents are read whole unless `max_tokens_per_doc` is given (there 4096 tokens by
default), and `priority` changes nothing, as requests share the machine fairly already.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from ..pruners.context.result import ScoredPassage
from .errors import ServiceError
from .rerank_core import Dialect, Documents, PruneExtra, cut_to_tokens, rank, texts_of
from .service import Service

router = APIRouter(tags=["rerank"])

DOCUMENTS_PER_UNIT = 100
"""Documents of one query that Cohere counts as a search unit."""


class NoDocuments(ServiceError):
    """There is nothing to rank: 400."""

    status = 400
    kind = "empty"


class RelevantSpans(Dialect):
    """Which spans of a document to give back: those scoring above `threshold`, best first."""

    mode: Literal["enabled", "disabled"]
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    max_spans: Annotated[int, Field(ge=1)] | None = None


class CohereRequest(Dialect):
    """A query and its documents; `model` is a name of /v1/models."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "default",
                    "query": "Who wrote Emma?",
                    "documents": ["Emma was written by Jane Austen.", "It rained all day."],
                    "top_n": 2,
                    "relevant_spans": {"mode": "enabled", "threshold": 0.3},
                }
            ]
        }
    )

    model: str
    query: str
    documents: Documents
    top_n: Annotated[int, Field(ge=1)] | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    relevant_spans: RelevantSpans | None = None
    return_documents: bool | None = None
    priority: Annotated[int, Field(ge=0, le=999)] | None = None
    prune: PruneExtra | None = Field(None, description="Opt-in, see `PruneExtra`.")


@router.post("/v2/rerank", summary="Rerank (Cohere)", response_model=None)
async def rerank(request: Request, body: CohereRequest) -> JSONResponse:
    """Rank documents: `{id, results: [{index, relevance_score, relevant_spans?}], meta}`."""
    service: Service = request.app.state.service
    served = service.model(body.model)
    if not body.documents:
        raise NoDocuments("invalid request: list of documents must not be empty")
    texts = texts_of(body.documents)
    served.check_size(body.query, texts)
    texts = await cut_to_tokens(served, texts, body.max_tokens_per_doc)
    ranking = await rank(
        served,
        body.query,
        texts,
        top_n=body.top_n,
        prune=body.prune,
        limits=service.settings.limits,
    )
    results = []
    for place, one in enumerate(ranking.ranked):
        result: dict[str, Any] = {"index": one.index, "relevance_score": one.relevance}
        if body.return_documents:
            result["document"] = {"text": texts[one.index]}
        spans = _spans(one, body.relevant_spans)
        if spans:
            result["relevant_spans"] = spans
        results.append(result | ranking.extras(place))
    made: dict[str, Any] = {
        "id": request.state.request_id,
        "results": results,
        "meta": _meta(len(texts), ranking.scores.tokens),
    }
    if ranking.failed:
        made["errors"] = errors = ranking.errors()
        made["meta"]["warnings"] = [
            f"document {one['index']} has no score: {one['message']}" for one in errors
        ]
    return JSONResponse(made)


def _meta(documents: int, tokens: int) -> dict[str, Any]:
    return {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": -(-documents // DOCUMENTS_PER_UNIT)},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }


def _spans(one: ScoredPassage, asked: RelevantSpans | None) -> list[dict[str, Any]]:
    if asked is None or asked.mode == "disabled":
        return []
    threshold = 0.1 if asked.threshold is None else asked.threshold
    rows = zip(one.starts.tolist(), one.ends.tolist(), one.keep_probability.tolist(), strict=True)
    spans = [{"start": a, "end": b, "score": score} for a, b, score in rows if score > threshold]
    spans.sort(key=lambda span: (-span["score"], span["start"]))
    return spans[: asked.max_spans]
