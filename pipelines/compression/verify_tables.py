"""Schemas of the last steps: what a compressed model was found to be, and what was exported."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from ...storage import Table
from ..columns import required

DENSE, COMPRESSED_MODEL, CONTROL = "dense", "compressed", "control"
COMPRESSED_STEPS = ("compress_weights", "compensate_weights", "recover_weights")


TASK = pa.struct(
    [
        required("task", pa.string()),
        required("metric", pa.string()),
        required("value", pa.float64()),  # higher is better
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
        required("id", pa.int64()),
        required("role", pa.string()),  # dense, compressed, control
        required("model", pa.string()),
        required("perplexity", pa.float64()),
        required("nll", pa.float64()),  # nats a token
        required("tokens", pa.int64()),  # scored
        required("kl", pa.float64()),  # KL(dense ‖ this), nats a token; 0 of the dense
        required("agreement", pa.float64()),  # share of first choices as the dense's
        required("ratio", pa.float64()),  # of perplexities, to the dense
        required("noise", pa.float64()),  # standard deviation of the ratio over resampled rows
        required("ratio_low", pa.float64()),  # 2.5 and 97.5 percent points of it
        required("ratio_high", pa.float64()),
        required("file_bytes", pa.int64()),  # of the folder
        required("parameters", pa.int64()),
        pa.field("zero_share", pa.float64()),  # of the layers' weights
        required("tasks", pa.list_(TASK)),
        required("verdict", pa.string()),  # accepted, refused; "" of dense and control
        required("reasons", pa.list_(pa.string())),
        required("row_ids", pa.list_(pa.int64())),  # N
        required("row_tokens", pa.list_(pa.int64())),  # N
        required("row_nll", pa.list_(pa.float64())),  # N, sums
        required("row_kl", pa.list_(pa.float64())),  # N, sums
    ]
)
# What an export weighs, a row a part of the model and one, "files", for the whole folder.
EXPORTED = pa.schema(
    [
        required("id", pa.int64()),
        required("part", pa.string()),
        required("bytes_before", pa.int64()),
        required("bytes_after", pa.int64()),
        required("parameters_before", pa.int64()),
        required("parameters_after", pa.int64()),
        required("zeros", pa.int64()),  # after, of the layers' weights
    ]
)
