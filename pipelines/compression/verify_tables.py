"""Schemas of the last steps: what a compressed model was found to be, and what was exported."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from ...storage import Table

DENSE, COMPRESSED_MODEL, CONTROL = "dense", "compressed", "control"
COMPRESSED_STEPS = ("compress_weights", "compensate_weights", "recover_weights")


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


TASK = pa.struct(
    [
        _field("task", pa.string()),
        _field("metric", pa.string()),
        _field("value", pa.float64()),  # higher is better
        pa.field("stderr", pa.float64()),
    ]
)
# What a run of a model measures differs from run to run, so it is no row: it stands beside the
# table, by role, as {prefill, decode (tokens a second), peak_memory, base_memory (bytes)}; a role
# that was not measured is not there. See measure_process.Speed.
SPEED_FILE = "speed.json"
SPEEDS = ("prefill", "decode", "peak_memory", "base_memory")


def judged_rows(table: Table) -> list[dict[str, Any]]:
    """Rows of a `verify_compression` table with what was measured; None where nothing was."""
    measured = json.loads(table.attachment(SPEED_FILE).read_text())
    return [
        row | {name: measured.get(row["role"], {}).get(name) for name in SPEEDS}
        for row in table.to_table().to_pylist()
    ]


# One row a model: dense, compressed, and the control where there is one.
VERIFY = pa.schema(
    [
        _field("id", pa.int64()),
        _field("role", pa.string()),  # dense, compressed, control
        _field("model", pa.string()),
        _field("perplexity", pa.float64()),
        _field("nll", pa.float64()),  # nats a token
        _field("tokens", pa.int64()),  # scored
        _field("kl", pa.float64()),  # KL(dense ‖ this), nats a token; 0 of the dense
        _field("agreement", pa.float64()),  # share of first choices as the dense's
        _field("ratio", pa.float64()),  # of perplexities, to the dense
        _field("noise", pa.float64()),  # standard deviation of the ratio over resampled rows
        _field("ratio_low", pa.float64()),  # 2.5 and 97.5 percent points of it
        _field("ratio_high", pa.float64()),
        _field("file_bytes", pa.int64()),  # of the folder
        _field("parameters", pa.int64()),
        pa.field("zero_share", pa.float64()),  # of the layers' weights
        _field("tasks", pa.list_(TASK)),
        _field("verdict", pa.string()),  # accepted, refused; "" of dense and control
        _field("reasons", pa.list_(pa.string())),
        _field("row_ids", pa.list_(pa.int64())),  # N
        _field("row_tokens", pa.list_(pa.int64())),  # N
        _field("row_nll", pa.list_(pa.float64())),  # N, sums
        _field("row_kl", pa.list_(pa.float64())),  # N, sums
    ]
)
# What an export weighs, a row a part of the model and one, "files", for the whole folder.
EXPORTED = pa.schema(
    [
        _field("id", pa.int64()),
        _field("part", pa.string()),
        _field("bytes_before", pa.int64()),
        _field("bytes_after", pa.int64()),
        _field("parameters_before", pa.int64()),
        _field("parameters_after", pa.int64()),
        _field("zeros", pa.int64()),  # after, of the layers' weights
    ]
)
