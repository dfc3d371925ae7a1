"""Schemas of the fine-tuning tables: chats, tokens, signals, decisions, export.

All five are keyed by the sample's id; the later ones are sidecars of the first. Lists about
tokens are of two lengths: L, all tokens of the sample, and T, its trainable ones (the tokens
that are a target: a turn of the assistant, its end-of-turn token included).
"""

from __future__ import annotations

import pyarrow as pa


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


MESSAGE = pa.struct(
    [
        _field("role", pa.string()),  # system, user, assistant, tool; "text" for plain text
        _field("content", pa.string()),
        _field("tool_calls", pa.string()),  # JSON as read, or ""
        _field("train", pa.bool_()),  # may its tokens be targets
    ]
)
CHATS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("source", pa.string()),  # file#row, row from 1
        _field("domain", pa.string()),  # "" where no domain field was named
        _field("format", pa.string()),  # messages, sharegpt, prompt_completion, alpaca, text
        _field("messages", pa.list_(MESSAGE)),
        _field("tools", pa.string()),  # JSON as read, or ""
        _field("raw", pa.string()),  # the row as it was read, JSON: what the export gives back
    ]
)
TOKENS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("domain", pa.string()),
        _field("input_ids", pa.list_(pa.int32())),  # L
        _field("trainable", pa.list_(pa.bool_())),  # L, never True at place 0
        _field("turn", pa.list_(pa.int32())),  # L, number of the message or packed document
        _field("protected", pa.list_(pa.bool_())),  # L, end of sequence or of turn
        _field("truncated", pa.bool_()),
    ]
)
# `token_signals` adds the float32 lists (T) that were asked for: see SIGNAL_COLUMNS.
TOKEN_SIGNALS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("domain", pa.string()),
        _field("token_position", pa.list_(pa.int32())),  # T, ascending
        _field("turn", pa.list_(pa.int32())),  # T
        _field("protected", pa.list_(pa.bool_())),  # T
    ]
)
SIGNAL_COLUMNS: dict[str, tuple[pa.Field, ...]] = {
    "loss": (
        _field("loss", pa.list_(pa.float32())),
        _field("entropy", pa.list_(pa.float32())),
        _field("log_sum_exp", pa.list_(pa.float32())),
    ),
    "rank": (_field("target_rank", pa.list_(pa.int32())),),
    "reference": (_field("reference_loss", pa.list_(pa.float32())),),
    "history": (_field("history_loss", pa.list_(pa.float32())),),
    "attention": (_field("prompt_attention", pa.list_(pa.float32())),),
    "alone": (_field("answer_loss_alone", pa.float32()),),
    "trajectory": (_field("loss_trajectory", pa.list_(pa.float32())),),  # one value a checkpoint
}
DECISION = pa.schema(
    [
        _field("id", pa.int64()),
        _field("keep", pa.bool_()),  # at least one token is trained
        _field("score", pa.float32()),
        _field("reason", pa.string()),
        pa.field("threshold", pa.float32()),
        pa.field("rival", pa.int64()),
        _field("weight", pa.float32()),
        _field("tokens", pa.int32()),  # T
        _field("kept_tokens", pa.int32()),
        _field("token_keep", pa.list_(pa.bool_())),  # T
        # Of a method that decides about tokens; T, or empty for one that decides about samples.
        _field("token_score", pa.list_(pa.float32())),
        _field("token_reason", pa.list_(pa.uint8())),  # into `token_reasons` of the notes
        # Where signals were there: mean loss and entropy of its trainable tokens, nats.
        pa.field("error", pa.float32()),
        pa.field("uncertainty", pa.float32()),
        # Of qtuning: 1 noise, 2 misconception, 3 redundant, 4 calibration.
        pa.field("quadrant", pa.uint8()),
        pa.field("topped_up", pa.bool_()),
    ]
)
EXPORT = pa.schema(
    [
        _field("id", pa.int64()),
        _field("input_ids", pa.list_(pa.int32())),  # L
        _field("attention_mask", pa.list_(pa.int8())),  # L, all 1
        _field("labels", pa.list_(pa.int64())),  # L, -100 where not trained
        _field("completion_mask", pa.list_(pa.int8())),  # L, labels != -100
        _field("assistant_masks", pa.list_(pa.int8())),  # L, the same
        _field("length", pa.int32()),
        _field("weight", pa.float32()),
    ]
)
