"""What a run saved and cost, from the rows of its evaluate and decision tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from ..storage import Table
from .compression.verify_tables import judged_rows


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the rows of an evaluate table; shares are 0..1, None where nothing is counted."""
    asked = [row for row in rows if row["answer_retrieved"]]
    made: dict[str, Any] = {
        "questions": len(rows),
        "with_answers": sum(row["answer_retrieved"] is not None for row in rows),
        "answer_retrieved": len(asked),
        "answer_kept": sum(bool(row["answer_kept"]) for row in asked),
        "tokens_in": sum(row["tokens_in"] for row in rows),
        "tokens_out": sum(row["tokens_out"] for row in rows),
        "chars_in": sum(row["chars_in"] for row in rows),
        "chars_out": sum(row["chars_out"] for row in rows),
        "baselines": {},
    }
    made["removed"] = 1 - made["chars_out"] / made["chars_in"] if made["chars_in"] else None
    for column in rows[0] if rows else ():
        if column.startswith("answer_kept_") and any(row[column] is not None for row in rows):
            name = column.removeprefix("answer_kept_")
            made["baselines"][name] = sum(bool(row[column]) for row in asked)
    return made


def fate(row: Mapping[str, Any]) -> str:
    """What became of a question's answer, in two words at most."""
    if row["answer_retrieved"] is None:
        return "none given"
    if not row["answer_retrieved"]:
        return "not retrieved"
    return "kept" if row["answer_kept"] else "lost"


def dataset_totals(decision: Table, data: Table) -> dict[str, int]:
    """Training rows and classes of a `prune_dataset` table, and how many of them are left."""
    table = decision.to_table(["id", "keep"])
    keep = table.column("keep").to_numpy(zero_copy_only=False)
    label = data.lookup(table.column("id").to_numpy(), ["label"]).column("label").to_numpy()
    return {
        "rows": len(keep),
        "rows_kept": int(keep.sum()),
        "classes": len(set(label.tolist())),
        "classes_left": len(set(label[keep].tolist())),
    }


def selection_totals(decision: Table) -> dict[str, int]:
    """Samples and trainable tokens of a `prune_sft` table, and how many of them were kept."""
    made = {"samples": 0, "samples_kept": 0, "tokens": 0, "tokens_kept": 0}
    for batch in decision.batches(columns=["keep", "tokens", "kept_tokens"]):
        made["samples"] += batch.num_rows
        made["samples_kept"] += int(pc.sum(batch.column("keep")).as_py() or 0)
        made["tokens"] += int(pc.sum(batch.column("tokens")).as_py() or 0)
        made["tokens_kept"] += int(pc.sum(batch.column("kept_tokens")).as_py() or 0)
    return made


_JUDGED = (
    "role",
    "perplexity",
    "ratio",
    "noise",
    "kl",
    "prefill",
    "decode",
    "peak_memory",
    "file_bytes",
    "parameters",
    "zero_share",
    "verdict",
    "reasons",
)


def model_totals(verify: Table) -> list[dict[str, Any]]:
    """Figures of the dense model, the compressed one and the control of a `verify_compression`."""
    return [{name: row[name] for name in _JUDGED} for row in judged_rows(verify)]


def model_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The same in words, and the verdict with its reasons."""
    made = []
    for row in rows:
        line = f"{row['role']:10} perplexity {row['perplexity']:.2f}"
        if row["role"] != "dense":
            line += f" ({row['ratio'] - 1:+.1%} ± {row['noise']:.1%}), KL {row['kl']:.3f} nats"
        line += f", {row['parameters']:,} parameters, {row['file_bytes'] / 1e6:.2f} MB"
        if row["decode"] is not None:
            line += f", decodes {row['decode']:.0f} tokens/s"
        made.append(line)
    told = [row for row in rows if row["verdict"]]
    return made + [f"{row['verdict']}: {'; '.join(row['reasons'])}" for row in told]
