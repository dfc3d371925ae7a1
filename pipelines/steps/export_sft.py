"""Step `export_sft`: the samples and tokens that a decision kept, as a trainer reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import StoreError
from ...storage import Manifest, Store, Table
from ..bundles import shard_of
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from ..sft_tables import EXPORT

IGNORED = -100
_DECIDED = ["id", "keep", "reason", "weight", "token_keep"]
_READ = ["id", "input_ids", "trainable"]


class ExportSftOptions(StepOptions):
    """`export_sft` has no options: what is kept was decided before."""


def plan(options: ExportSftOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each shard of tokens; the notes say how the selection came about."""
    tokens, decision = inputs["tokens"], inputs["decision"]
    counts = decision.to_table(columns=["keep", "tokens", "kept_tokens"])
    samples = tokens.manifest.rows
    kept = int(np.sum(counts.column("keep").to_numpy()))
    trainable, trained = (
        int(counts.column(name).to_numpy().sum()) for name in ("tokens", "kept_tokens")
    )
    models = {name: tokens.manifest.models[name] for name in ("tokenizer", "chat_template")}
    notes = {
        **models,
        "decisions": decisions_of(context.store, decision.manifest),
        "samples": samples,
        "truncated_samples": sum(
            batch.column("truncated").true_count for batch in tokens.batches(columns=["truncated"])
        ),
        "kept_samples": kept,
        "sample_ratio": round(kept / samples, 6) if samples else 0.0,
        "trainable_tokens": trainable,
        "kept_tokens": trained,
        "token_ratio": round(trained / trainable, 6) if trainable else 0.0,
    }
    return Plan(EXPORT, len(tokens.shards()), {}, models, payload=tokens.shards(), notes=notes)


def decisions_of(store: Store, decision: Manifest) -> list[dict[str, Any]]:
    """Method, options and seed of a decision and of those before it, the first one first."""
    before = [
        row
        for key in decision.parents
        for manifest in [store.manifest(key)]
        if manifest.step == decision.step
        for row in decisions_of(store, manifest)
    ]
    own = {name: decision.options.get(name) for name in ("method", "options", "by_domain")}
    return [*before, {**own, "seed": decision.seed, "table": decision.key}]


def shard(job: Job, index: int, out: Rows) -> None:
    """Labels for the samples of one shard of tokens."""
    tokens = shard_of(job.input("tokens"), job.plan.payload[index], _READ)
    ids = tokens.column("id").to_pylist()
    decided = job.input("decision").lookup(ids, columns=_DECIDED, missing="skip").to_pylist()
    by_id = {row["id"]: row for row in decided}
    made: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row in tokens.to_pylist():
        found = by_id.get(row["id"])
        if found is None:
            dropped["not decided"] += 1  # its signals were rejected
        elif not found["keep"]:
            dropped[found["reason"]] += 1
        elif not any(found["token_keep"]):
            dropped["no token left to train"] += 1
        else:
            made.append(_row(row, found))
    if made:
        out.write(pa.Table.from_pylist(made, EXPORT))
    out.count(len(made), dropped)


def _row(tokens: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    ids = np.array(tokens["input_ids"], np.int64)
    targets = np.flatnonzero(tokens["trainable"])
    keep = np.array(decided["token_keep"], np.bool_)
    if len(keep) != len(targets):
        raise StoreError(
            f"sample {tokens['id']}: expected a decision about its {len(targets)} trainable tokens,"
            f" found one about {len(keep)}. The decision is about other tokens: make it again from"
            " the same tokenize_chats table."
        )
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[targets[keep]] = ids[targets[keep]]
    mask = (labels != IGNORED).astype(np.int8)
    return {
        "id": tokens["id"],
        "input_ids": ids,
        "attention_mask": np.ones(len(ids), np.int8),
        "labels": labels,
        "completion_mask": mask,
        "assistant_masks": mask,
        "length": len(ids),
        "weight": decided["weight"],
    }


SPEC = StepSpec(
    name="export_sft",
    version=1,
    options=ExportSftOptions,
    inputs={"tokens": Slot(("tokenize_chats",)), "decision": Slot(("prune_sft",))},
    plan=plan,
    shard=shard,
    about="The samples and tokens that a decision kept, as a trainer reads them.",
)
