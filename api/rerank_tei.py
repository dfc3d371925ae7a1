"""POST /rerank as text-embeddings-inference answers it: a bare array, best first.

Passages longer than the window are read in blocks, so `truncate` has nothing to cut in them;
with `truncate: false` a question too long for the window is refused as there.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field

from ..errors import InputError
from .errors import ServiceError, TooLarge, status_of
from .rerank_core import Dialect, PruneExtra, Ranking, Texts, all_scored, rank
from .served import Scores
from .service import Service

router = APIRouter(tags=["rerank"])


class Empty(ServiceError):
    """There is nothing to rank: 400."""

    status = 400
    kind = "empty"


class TeiRequest(Dialect):
    """A query and its texts. `raw_scores` gives logits in place of their sigmoid."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "Who wrote Emma?",
                    "texts": ["Emma was written by Jane Austen.", "It rained all day."],
                    "return_text": True,
                }
            ]
        }
    )

    query: str
    texts: Texts
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    raw_scores: bool = False
    return_text: bool = False
    prune: PruneExtra | None = Field(None, description="Opt-in, see `PruneExtra`.")


@router.post("/rerank", summary="Rerank (text-embeddings-inference)", response_model=None)
async def rerank(request: Request, body: TeiRequest) -> JSONResponse:
    """Rank texts by the default model: `[{index, score, text?}]`, best first."""
    began = time.monotonic()
    service: Service = request.app.state.service
    if not body.texts:
        raise Empty("`texts` cannot be empty")
    served = service.model()
    ranking = await rank(
        served,
        body.query,
        body.texts,
        top_n=None,
        prune=body.prune,
        limits=service.settings.limits,
    )
    _check_cut(body, ranking)
    if body.prune is None:
        all_scored(ranking)
    headers = _headers(body, ranking.scores, began)
    headers["x-compute-type"] = "cpu" if getattr(served.scorer.forward, "on_cpu", True) else "gpu"
    return JSONResponse(_ranks(body, ranking), headers=headers)


def _check_cut(body: TeiRequest, ranking: Ranking) -> None:
    if not any(one.truncated for one in ranking.ranked):
        return
    if body.truncate is False:
        raise TooLarge("the query is longer than half of the model's window; `truncate` is false.")
    if body.truncation_direction.lower() == "left":
        raise InputError(
            "the query is longer than half of the model's window, and is cut at its end only;"
            " shorten it, or leave `truncation_direction` out."
        )


def _ranks(body: TeiRequest, ranking: Ranking) -> list[dict[str, Any]]:
    made = []
    for place, one in enumerate(ranking.ranked):
        result: dict[str, Any] = {"index": one.index}
        if body.return_text:
            result["text"] = body.texts[one.index]
        result["score"] = one.relevance_logit if body.raw_scores else one.relevance
        made.append(result | ranking.extras(place))
    for index, error in ranking.failed:
        made.append({"index": index, "error": {"type": status_of(error)[1], "message": str(error)}})
    return made


def _headers(body: TeiRequest, scores: Scores, began: float) -> dict[str, str]:
    total = _milliseconds(time.monotonic() - began)
    characters = len(body.query) + sum(map(len, body.texts))
    return {
        "x-compute-time": total,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(scores.tokens),
        "x-total-time": total,
        "x-tokenization-time": _milliseconds(scores.tokenise_seconds),
        "x-queue-time": _milliseconds(scores.queue_seconds),
        "x-inference-time": _milliseconds(scores.inference_seconds),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(1000 * seconds))
