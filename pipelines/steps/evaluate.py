"""Step `evaluate`: what pruning saved and cost each question, beside three plain methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ...storage import Table
from ..bundles import BASELINES, DECIDED_INPUTS, Bundle, baseline_masks, decided
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec

_COUNTS = ("passages", "sentences", "sentences_kept", "tokens_in", "tokens_out")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        *[pa.field(name, pa.int64(), nullable=False) for name in _COUNTS],
        pa.field("chars_in", pa.int64(), nullable=False),
        pa.field("chars_out", pa.int64(), nullable=False),
        # Null where the question has no answers to look for.
        pa.field("answer_retrieved", pa.bool_()),
        pa.field("answer_kept", pa.bool_()),
        *[pa.field(f"answer_kept_{name}", pa.bool_()) for name in BASELINES],
        *[pa.field(f"chars_out_{name}", pa.int64()) for name in BASELINES],
    ]
)


class EvaluateOptions(StepOptions):
    """`evaluate` has no options; the random baseline draws from the recipe's seed."""


def plan(options: EvaluateOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each shard of signals."""
    shards = inputs["signals"].shards()
    return Plan(SCHEMA, len(shards), {}, payload=shards)


def shard(job: Job, index: int, out: Rows) -> None:
    """Look for the answers in what was retrieved and in what each method kept of it.

    An answer survives where one of its occurrences has all its sentences kept. The baselines
    get as many characters as pruning kept of this question, and never more.
    """
    found = decided(job, job.plan.payload[index])
    rows = [_row(bundle, keep, job.seed) for bundle, keep in found]
    out.write(pa.Table.from_pylist(rows, SCHEMA))
    lost = sum(bool(row["answer_retrieved"]) and not row["answer_kept"] for row in rows)
    out.count(len(rows) - lost, {"answer lost": lost} if lost else {})


def _row(bundle: Bundle, keep: Any, seed: int) -> dict[str, Any]:
    chars, tokens = bundle.chars, bundle.tokens
    limit = int(chars[keep].sum())
    row: dict[str, Any] = {
        "id": bundle.question["id"],
        "name": bundle.question["name"],
        "question": bundle.question["question"],
        "passages": len(bundle.passages()),
        "sentences": len(keep),
        "sentences_kept": int(keep.sum()),
        "tokens_in": int(tokens.sum()),
        "tokens_out": int(tokens[keep].sum()),
        "chars_in": int(chars.sum()),
        "chars_out": limit,
        "answer_retrieved": bundle.answerable if bundle.asked else None,
        "answer_kept": bundle.survives(keep) if bundle.asked else None,
    }
    for name, mask in baseline_masks(bundle, limit, seed).items():
        row[f"answer_kept_{name}"] = bundle.survives(mask) if bundle.asked else None
        row[f"chars_out_{name}"] = int(chars[mask].sum())
    return row


SPEC = StepSpec(
    name="evaluate",
    version=1,
    options=EvaluateOptions,
    inputs=DECIDED_INPUTS,
    plan=plan,
    shard=shard,
    about="What pruning saved and cost each question, beside three plain methods.",
)
