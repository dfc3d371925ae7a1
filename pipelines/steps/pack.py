"""Step `pack`: the pruned passages of each question, in the order a reader should get them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...storage import Table
from ..bundles import DECIDED_INPUTS, Bundle, decided
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("question", pa.int64(), nullable=False),
        pa.field("chunk", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("relevance_logit", pa.float32()),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("chars_in", pa.int32(), nullable=False),
        pa.field("chars_out", pa.int32(), nullable=False),
        pa.field("tokens_in", pa.int32(), nullable=False),
        pa.field("tokens_out", pa.int32(), nullable=False),
    ]
)


class PackOptions(StepOptions):
    """Options of `pack`.

    Attributes
    ----------
    order
        `relevance`: by the model's ranking score, best first, ties by the order retrieved.
        `retrieved`: as the index found them.
    top_k
        Passages a question to hand on; None for all. The others stay out of this table, with
        the reason `below top_k`.
    """

    order: Literal["relevance", "retrieved"] = "relevance"
    top_k: int | None = Field(default=None, ge=1)


def plan(options: PackOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each shard of signals."""
    shards = inputs["signals"].shards()
    return Plan(SCHEMA, len(shards), options.model_dump(), payload=shards)


def shard(job: Job, index: int, out: Rows) -> None:
    """Slice the kept sentences from the passages; a passage with none stays as an empty text."""
    options: PackOptions = job.options  # type: ignore[assignment]
    made: list[dict[str, Any]] = []
    below = empty = 0
    for bundle, keep in decided(job, job.plan.payload[index]):
        rows = list(_passages(bundle, keep))
        if options.order == "relevance":
            rows.sort(key=lambda row: -_logit(row))  # stable: ties stay as retrieved
        limit = len(rows) if options.top_k is None else options.top_k
        below += max(len(rows) - limit, 0)
        empty += sum(not row["text"] for row in rows[:limit])
        made.extend({**row, "rank": rank} for rank, row in enumerate(rows[:limit]))
    out.write(pa.Table.from_pylist(made, SCHEMA))
    reasons = {"below top_k": below, "no sentence kept": empty}
    out.count(len(made) - empty, {name: n for name, n in reasons.items() if n})


def _logit(row: Mapping[str, Any]) -> float:
    value = row["relevance_logit"]
    return -np.inf if value is None else float(value)


def _passages(
    bundle: Bundle, keep: np.ndarray[Any, np.dtype[np.bool_]]
) -> Iterator[dict[str, Any]]:
    names = bundle.columns.column_names
    logits = bundle.columns.column("relevance_logit") if "relevance_logit" in names else None
    for first, last in bundle.passages():
        chunk = int(bundle.chunk[first])
        text = bundle.texts[chunk]
        kept = [row for row in range(first, last) if keep[row]]
        yield {
            "id": int(bundle.passage[first]),
            "question": bundle.question["id"],
            "chunk": chunk,
            "relevance_logit": logits[first].as_py() if logits is not None else None,
            "title": bundle.titles[chunk],
            "text": "".join(text[bundle.start[row] : bundle.end[row]] for row in kept).strip(),
            "chars_in": int(bundle.chars[first:last].sum()),
            "chars_out": int(bundle.chars[kept].sum()) if kept else 0,
            "tokens_in": int(bundle.tokens[first:last].sum()),
            "tokens_out": int(bundle.tokens[kept].sum()) if kept else 0,
        }


SPEC = StepSpec(
    name="pack",
    version=1,
    options=PackOptions,
    inputs=DECIDED_INPUTS,
    plan=plan,
    shard=shard,
    about="The pruned passages of each question, best first.",
)
