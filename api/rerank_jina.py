"""POST /v1/rerank as Jina answers it; Cohere's v1 clients, which ask the same path, read it too.

Documents come back with the results unless `return_documents` is false: Jina's own default.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from ..errors import InputError
from .rerank_core import (
    Dialect,
    Document,
    Documents,
    PruneExtra,
    Texts,
    cut_to_tokens,
    rank,
    texts_of,
)
from .service import Service

router = APIRouter(tags=["rerank"])


class JinaRequest(Dialect):
    """A query and its documents.

    `rank_fields` and `max_chunks_per_doc` are of Cohere's v1: the fields of an object that are
    ranked (`text` by default), and how many windows of the model of each document are read (all
    by default).
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "default",
                    "query": "Who wrote Emma?",
                    "documents": ["Emma was written by Jane Austen.", "It rained all day."],
                    "top_n": 1,
                    "prune": {"threshold": 0.3},
                }
            ]
        }
    )

    model: str | None = None
    query: str
    documents: Documents
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    rank_fields: Texts | None = None
    max_chunks_per_doc: Annotated[int, Field(ge=1)] | None = None
    prune: PruneExtra | None = Field(None, description="Opt-in, see `PruneExtra`.")


@router.post("/v1/rerank", summary="Rerank (Jina, Cohere v1)", response_model=None)
async def rerank(request: Request, body: JinaRequest) -> JSONResponse:
    """Rank documents: `{model, object, usage, results: [{index, relevance_score, document?}]}`."""
    service: Service = request.app.state.service
    served = service.model(body.model)
    if not body.documents:
        raise InputError("`documents` must hold at least one document; found none.")
    texts = texts_of(body.documents, body.rank_fields)
    served.check_size(body.query, texts)
    if body.max_chunks_per_doc is not None:
        most = body.max_chunks_per_doc * served.config.max_length
        texts = await cut_to_tokens(served, texts, most)
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
        if body.return_documents is not False:
            result["document"] = _shown(body.documents[one.index], texts[one.index])
        results.append(result | ranking.extras(place))
    tokens = ranking.scores.tokens
    made: dict[str, Any] = {
        "model": served.name,
        "object": "list",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results,
    }
    if ranking.failed:
        made["errors"] = ranking.errors()
    return JSONResponse(made)


def _shown(document: Document, text: str) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else {"text": text, **document}
