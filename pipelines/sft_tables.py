"""Schemas of the fine-tuning tables: chats, tokens, signals, decisions, export.

All five are keyed by the sample's id; the later ones are sidecars of the first. Lists about
tokens are of two lengths: L, all tokens of the sample, and T, its trainable ones (the tokens
that are a target: a turn of the assistant, its end-of-turn token included).
"""

from __future__ import annotations

import pyarrow as pa

from .columns import required

MESSAGE = pa.struct(
    [
        required("role", pa.string()),  # system, user, assistant, tool; "text" for plain text
        required("content", pa.string()),
        required("tool_calls", pa.string()),  # JSON as read, or ""
        required("train", pa.bool_()),  # may its tokens be targets
    ]
)
CHATS = pa.schema(
    [
        required("id", pa.int64()),
        required("source", pa.string()),  # file#row, row from 1
        required("domain", pa.string()),  # "" where no domain field was named
        required("format", pa.string()),  # messages, sharegpt, prompt_completion, alpaca, text
        required("messages", pa.list_(MESSAGE)),
        required("tools", pa.string()),  # JSON as read, or ""
        required("raw", pa.string()),  # the row as it was read, JSON: what the export gives back
    ]
)
TOKENS = pa.schema(
    [
        required("id", pa.int64()),
        required("domain", pa.string()),
        required("input_ids", pa.list_(pa.int32())),  # L
        required("trainable", pa.list_(pa.bool_())),  # L, never True at place 0
        required("turn", pa.list_(pa.int32())),  # L, number of the message or packed document
        required("protected", pa.list_(pa.bool_())),  # L, end of sequence or of turn
        required("truncated", pa.bool_()),
    ]
)
# `token_signals` adds the float32 lists (T) that were asked for: see SIGNAL_COLUMNS.
TOKEN_SIGNALS = pa.schema(
    [
        required("id", pa.int64()),
        required("domain", pa.string()),
        required("token_position", pa.list_(pa.int32())),  # T, ascending
        required("turn", pa.list_(pa.int32())),  # T
        required("protected", pa.list_(pa.bool_())),  # T
    ]
)
SIGNAL_COLUMNS: dict[str, tuple[pa.Field, ...]] = {
    "loss": (
        required("loss", pa.list_(pa.float32())),
        required("entropy", pa.list_(pa.float32())),
        required("log_sum_exp", pa.list_(pa.float32())),
    ),
    "rank": (required("target_rank", pa.list_(pa.int32())),),
    "reference": (required("reference_loss", pa.list_(pa.float32())),),
    "history": (required("history_loss", pa.list_(pa.float32())),),
    "attention": (required("prompt_attention", pa.list_(pa.float32())),),
    "alone": (required("answer_loss_alone", pa.float32()),),
    "trajectory": (required("loss_trajectory", pa.list_(pa.float32())),),  # one value a checkpoint
}
DECISION = pa.schema(
    [
        required("id", pa.int64()),
        required("keep", pa.bool_()),  # at least one token is trained
        required("score", pa.float32()),
        required("reason", pa.string()),
        pa.field("threshold", pa.float32()),
        pa.field("rival", pa.int64()),
        required("weight", pa.float32()),
        required("tokens", pa.int32()),  # T
        required("kept_tokens", pa.int32()),
        required("token_keep", pa.list_(pa.bool_())),  # T
        # Of a method that decides about tokens; T, or empty for one that decides about samples.
        required("token_score", pa.list_(pa.float32())),
        required("token_reason", pa.list_(pa.uint8())),  # into `token_reasons` of the notes
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
        required("id", pa.int64()),
        required("input_ids", pa.list_(pa.int32())),  # L
        required("attention_mask", pa.list_(pa.int8())),  # L, all 1
        required("labels", pa.list_(pa.int64())),  # L, -100 where not trained
        required("completion_mask", pa.list_(pa.int8())),  # L, labels != -100
        required("assistant_masks", pa.list_(pa.int8())),  # L, the same
        required("length", pa.int32()),
        required("weight", pa.float32()),
    ]
)
