"""Schemas of the compression stage: calibration rows, statistics, plan, compressed model.

Layers are numbered from 0; modules are named by their paths inside a block (`mlp.up_proj`), and
what concerns a whole block has the module "".
"""

from __future__ import annotations

import pyarrow as pa

from ..columns import required

# Rows to calibrate, recover or evaluate on. `labels` (-100 where not trained) follow the source.
CALIBRATION = pa.schema(
    [
        required("id", pa.int64()),
        required("domain", pa.string()),
        required("input_ids", pa.list_(pa.int32())),  # L
        required("labels", pa.list_(pa.int64())),  # L
        required("sources", pa.list_(pa.int64())),  # ids of the rows that the tokens come from
        pa.field("score", pa.float32()),  # what the row was chosen by, where it was
    ]
)
# One array of a layer, cut into slices of at most SLICE_BYTES.
STATISTICS = pa.schema(
    [
        required("id", pa.int64()),
        required("part", pa.int32()),  # of the calibration rows
        required("layer", pa.int32()),
        required("module", pa.string()),
        required("statistic", pa.string()),
        required("dtype", pa.string()),  # float32, float64 or int64
        required("shape", pa.list_(pa.int64())),
        required("slice", pa.int32()),
        required("values", pa.binary()),  # little-endian, row-major
    ]
)
SLICE_BYTES = 8 << 20
# What is to be done to each matrix, or to each part of a layer. One row for each (layer, module).
PLAN = pa.schema(
    [
        required("id", pa.int64()),
        required("layer", pa.int32()),
        required("module", pa.string()),  # "attention", "mlp", "experts", "" (a layer), a matrix
        required("unit", pa.string()),  # weight, head, neuron, expert, layer
        required("total", pa.int64()),  # weights, heads (key-value groups), neurons, experts; 1
        required("keep", pa.int64()),  # so many of them stay
        required("parameters", pa.int64()),  # of the matrix or part, before
        pa.field("n", pa.int32()),  # n of m consecutive inputs stay; null without a pattern
        pa.field("m", pa.int32()),
        pa.field("bits", pa.int32()),  # null where it is not quantised
        pa.field("group_size", pa.int32()),  # inputs that share a scale; 0 = a whole row
        pa.field("importance", pa.float32()),  # of the layer, where the allocation measures one
        # Positions of what stays, ascending, where the plan decided it (a score over all layers);
        # null where the compressor chooses, within the layer.
        pa.field("kept", pa.list_(pa.int32())),
    ]
)
# A compressed model: a row for each matrix or part that was changed; its files are attachments
# which together are a folder that transformers loads (see model_tables).
COMPRESSED = pa.schema(
    [
        required("id", pa.int64()),
        required("layer", pa.int32()),
        required("module", pa.string()),
        required("unit", pa.string()),
        required("total", pa.int64()),
        required("kept", pa.int64()),
        pa.field("bits", pa.int32()),
        pa.field("group_size", pa.int32()),
        # ||XW' - XW||_F / ||XW||_F over the calibration rows, where it was measured.
        pa.field("error", pa.float32()),
        # Positions of the heads, neurons or experts that stay; null for weights.
        pa.field("positions", pa.list_(pa.int32())),
        required("note", pa.string()),
    ]
)
