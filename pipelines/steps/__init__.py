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
    export_sft,
    index,
    pack,
    prune_context,
    prune_passages,
    prune_sft,
    questions,
    read_chats,
    read_dataset,
    report,
    report_dataset,
    report_sft,
    retrieve,
    sweep,
    token_signals,
    tokenize_chats,
    train_lm,
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
    "prune_sft": prune_sft.SPEC,
    "pack": pack.SPEC,
    "evaluate": evaluate.SPEC,
    "sweep": sweep.SPEC,
    "report": report.SPEC,
    "report_sft": report_sft.SPEC,
    "report_dataset": report_dataset.SPEC,
    "read_chats": read_chats.SPEC,
    "read_dataset": read_dataset.SPEC,
    "tokenize_chats": tokenize_chats.SPEC,
    "export_sft": export_sft.SPEC,
    "train_lm": train_lm.SPEC,
    "token_signals": token_signals.SPEC,
    "label_silver": SILVER,
    "context_scores": SCORES,
    "evaluate_context": EVALUATE,
}
