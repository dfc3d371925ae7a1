"""The steps a recipe can name, one module each."""

from __future__ import annotations

from ..context_scores import SCORES
from ..engine import StepSpec
from ..evaluate_context import EVALUATE
from ..silver_labels import SILVER
from . import (
    chunk,
    cluster_rows,
    cluster_tokens,
    context_signals,
    distil,
    embed,
    evaluate,
    export_sft,
    import_scores,
    index,
    knn_shapley,
    neighbours,
    noise_found,
    pack,
    prompt_task,
    prompt_vocabulary,
    prune_context,
    prune_dataset,
    prune_passages,
    prune_scores,
    prune_sft,
    questions,
    read_chats,
    read_dataset,
    report,
    report_dataset,
    report_sft,
    retrieve,
    sweep,
    sweep_alpha,
    teacher_outputs,
    token_signals,
    tokenize_chats,
    train_classifier,
    train_lm,
)

STEPS: dict[str, StepSpec] = {
    # what any data passes through
    "embed": embed.SPEC,
    "cluster_rows": cluster_rows.SPEC,
    "neighbours": neighbours.SPEC,
    "prune_scores": prune_scores.SPEC,
    # retrieved contexts
    "chunk": chunk.SPEC,
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
    # fine-tuning data
    "read_chats": read_chats.SPEC,
    "train_lm": train_lm.SPEC,
    "tokenize_chats": tokenize_chats.SPEC,
    "token_signals": token_signals.SPEC,
    "prune_sft": prune_sft.SPEC,
    "export_sft": export_sft.SPEC,
    "report_sft": report_sft.SPEC,
    # labelled data
    "read_dataset": read_dataset.SPEC,
    "train_classifier": train_classifier.SPEC,
    "teacher_outputs": teacher_outputs.SPEC,
    "knn_shapley": knn_shapley.SPEC,
    "import_scores": import_scores.SPEC,
    "prune_dataset": prune_dataset.SPEC,
    "noise_found": noise_found.SPEC,
    "sweep_alpha": sweep_alpha.SPEC,
    "distil": distil.SPEC,
    "report_dataset": report_dataset.SPEC,
    # prompts
    "prompt_task": prompt_task.SPEC,
    "prompt_vocabulary": prompt_vocabulary.SPEC,
    "cluster_tokens": cluster_tokens.SPEC,
    # quality of context pruning
    "label_silver": SILVER,
    "context_scores": SCORES,
    "evaluate_context": EVALUATE,
}
