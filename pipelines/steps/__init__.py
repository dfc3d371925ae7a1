"""The steps a recipe can name, one module each."""

from __future__ import annotations

from ..context_scores import SCORES
from ..engine import StepSpec
from ..evaluate_context import EVALUATE
from ..silver_labels import SILVER
from . import (
    chunk,
    context_signals,
    embed,
    evaluate,
    index,
    pack,
    prune_context,
    prune_passages,
    questions,
    read_chats,
    report,
    retrieve,
    sweep,
    tokenize_chats,
)

STEPS: dict[str, StepSpec] = {
    "chunk": chunk.SPEC,
    "embed": embed.SPEC,
    "prune_passages": prune_passages.SPEC,
    "index": index.SPEC,
    "questions": questions.SPEC,
    "retrieve": retrieve.SPEC,
    "context_signals": context_signals.SPEC,
    "prune_context": prune_context.SPEC,
    "pack": pack.SPEC,
    "evaluate": evaluate.SPEC,
    "sweep": sweep.SPEC,
    "report": report.SPEC,
    "read_chats": read_chats.SPEC,
    "tokenize_chats": tokenize_chats.SPEC,
    "label_silver": SILVER,
    "context_scores": SCORES,
    "evaluate_context": EVALUATE,
}
