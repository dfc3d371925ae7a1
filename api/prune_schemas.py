"""What POST /v1/prune takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

EXAMPLE: dict[str, JsonValue] = {
    "question": "Who wrote Emma?",
    "passages": [
        "Emma is a novel about youthful hubris. It was written by Jane Austen.",
        {"id": "p2", "title": "Weather", "text": "It rained all day. The streets were wet."},
    ],
    "threshold": 0.3,
}


class Strict(BaseModel):
    """A body in which an unknown key is an error, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Passage(Strict):
    """A passage with a title or an id of the caller's."""

    text: str
    title: str | None = None
    id: str | int | None = None


class PruneRequest(Strict):
    """A question, its passages, and the options of `ContextPruner.prune`."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    question: str = Field(description="What the passages should answer; not blank.")
    passages: list[str | Passage] = Field(description="Strings, or objects with `text`.")
    model: str | None = Field(None, description="A name of /v1/models; the first by default.")
    titles: list[str | None] | Literal["first_sentence"] | None = Field(
        None, description="One a passage, or `first_sentence`: each passage opens with its title."
    )
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Sentences scoring strictly above stay; the model's by default."
    )
    aggregation: Literal["mean", "vote"] | None = Field(
        None, description="From tokens to sentences; the model's by default."
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the so many most relevant passages come back."
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Most tokens of kept text over all passages."
    )
    min_sentences: int = Field(0, ge=0, description="At least so many stay of every passage.")
    keep_title: bool = Field(True, description="A title stays if another sentence does.")
    protect: list[str] = Field(
        [], description="Regular expressions in RE2's syntax; a sentence with a match stays."
    )
    on_empty: Literal["empty", "top1", "original"] = Field(
        "empty", description="What becomes of a passage with nothing kept."
    )
    sentences: bool = Field(True, description="Whether results list their sentences.")
    return_scores: bool = Field(
        False,
        description="Adds what a reader needs to decide again without the model: tokens of each"
        " sentence, and the title's score.",
    )


class Sentence(BaseModel):
    """passage[start:end] in characters (code points), its score 0..1, the verdict and why."""

    start: int
    end: int
    score: float
    kept: bool
    reason: str
    tokens: int | None = Field(None, description="With `return_scores`.")


class Failure(BaseModel):
    """Why a passage has no score."""

    type: str
    message: str


class PruneResult(BaseModel):
    """One passage; `index` is its place in the request."""

    index: int
    id: str | int | None = None
    text: str | None = None
    relevance: float | None = None
    relevance_logit: float | None = None
    compression: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    chars_in: int | None = None
    chars_out: int | None = None
    blocks: int | None = None
    truncated: bool | None = None
    title_kept: bool | None = None
    title_score: float | None = Field(None, description="With `return_scores`.")
    title_tokens: int | None = Field(None, description="With `return_scores`.")
    sentences: list[Sentence] | None = None
    error: Failure | None = Field(None, description="In place of a score, never beside one.")


class Usage(BaseModel):
    """Of one request: kept and given tokens, and what the network read."""

    tokens_in: int
    tokens_out: int
    model_tokens: int
    blocks: int
    tokenise_seconds: float
    queue_seconds: float
    inference_seconds: float


class PruneResponse(BaseModel):
    """Results by relevance, highest first; passages without a score come last."""

    model: str
    threshold: float
    aggregation: str
    results: list[PruneResult]
    usage: Usage


class ErrorBody(BaseModel):
    """Every error of the service but those of the rerank dialects."""

    error: dict[str, Any]
