"""`sparse_gated_mlp` in Triton: gate, threshold and `up` in one kernel, `down` in another.

The first takes a few neurons a program: their gate's rows, then those of `up` whose neuron lives.
The second takes a part of the neurons and a strip of columns, reads the live rows, and writes a
partial sum; torch adds the parts in their order. Loads masked by row move no bytes for dead
neurons. No atomics and no autotuning, so two runs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gated_mlp import ACTIVATIONS, MOST_ROWS
from .gated_mlp_torch import gathered

NEURONS = 16
INNER = 128
COLUMNS = 128
PROGRAMS = 512  # of the second kernel: a few for each processor of a large GPU
WARPS = 4


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """act(value), by its place in ACTIVATIONS."""
    if ACTIVATION == 0:
        made = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == 1:
        made = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 2:
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        made = value / (1.0 + tl.exp(-inner))
    else:
        made = tl.where(value <= 0.0, 0.0, value)
    return made


@triton.jit
def _products(x, weight, row, row_in, neuron, reads, size, x_row, weight_row, INNER: tl.constexpr):
    """(rows, neurons) float32 of x and the rows of `weight` that `reads`; 0 for the others."""
    inner = tl.arange(0, INNER)
    total = tl.zeros((row.shape[0], neuron.shape[0], INNER), tl.float32)
    for start in range(0, size, INNER):
        column = start + inner
        inside = column < size
        left = tl.load(
            x + row[:, None] * x_row + column[None, :],
            mask=row_in[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + neuron[:, None].to(tl.int64) * weight_row + column[None, :],
            mask=reads[:, None] & inside[None, :],
            other=0.0,
        )
        total += left.to(tl.float32)[:, None, :] * right.to(tl.float32)[None, :, :]
    return tl.sum(total, 2)


@triton.jit
def gate_kernel(
    x,
    gate,
    up,
    limit,
    out,
    rows,
    neurons,
    size,
    x_row,
    gate_row,
    up_row,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write h (rows, neurons) float32 to `out`, 0 for the dead."""
    row = tl.arange(0, ROWS)
    row_in = row < rows
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    neuron_in = neuron < neurons
    border = tl.load(limit + neuron, mask=neuron_in, other=0.0)[None, :]
    made = _products(x, gate, row, row_in, neuron, neuron_in, size, x_row, gate_row, INNER)
    made = _activated(made, ACTIVATION)
    if PRODUCT:
        made *= _products(x, up, row, row_in, neuron, neuron_in, size, x_row, up_row, INNER)
        made = tl.where(tl.abs(made) <= border, 0.0, made)
    else:
        dead = (tl.abs(made) <= border) | (row >= rows)[:, None]
        reads = (tl.max(1 - dead.to(tl.int32), 0) > 0) & neuron_in
        if tl.max(reads.to(tl.int32), 0) > 0:
            made *= _products(x, up, row, row_in, neuron, reads, size, x_row, up_row, INNER)
        made = tl.where(dead, 0.0, made)
    place = row[:, None] * neurons + neuron[None, :]
    tl.store(out + place, made, mask=row_in[:, None] & neuron_in[None, :])


@triton.jit
def down_kernel(
    inner,
    down,
    parts,
    rows,
    neurons,
    columns,
    width,
    down_row,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the sum over neurons [p * width, (p + 1) * width) to `parts` (p, rows, columns)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_in = column < columns
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    row_in = row < rows
    total = tl.zeros((ROWS, NEURONS, COLUMNS), tl.float32)
    for start in range(part * width, tl.minimum((part + 1) * width, neurons), NEURONS):
        neuron = start + tl.arange(0, NEURONS)
        made = tl.load(
            inner + row[:, None] * neurons + neuron[None, :],
            mask=row_in[:, None] & (neuron < neurons)[None, :],
            other=0.0,
        )
        reads = tl.max((made != 0.0).to(tl.int32), 0) > 0
        own = tl.load(
            down + neuron[:, None].to(tl.int64) * down_row + column[None, :],
            mask=reads[:, None] & column_in[None, :],
            other=0.0,
        )
        total += made[:, :, None] * own.to(tl.float32)[None, :, :]
    place = (part * rows + row)[:, None] * columns + column[None, :]
    tl.store(parts + place, tl.sum(total, 1), mask=row_in[:, None] & column_in[None, :])


@torch.no_grad()
def masked(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    limit: torch.Tensor,
    activation: str,
    product: bool,
) -> torch.Tensor:
    """(B, d_out)."""
    rows, size = x.shape
    neurons, columns = down_t.shape
    if not 0 < rows <= MOST_ROWS or not neurons or not columns or x.dtype == torch.float64:
        return gathered(x, gate, up, down_t, limit, activation, product)
    x, gate, up, down_t = (one.contiguous() for one in (x, gate, up, down_t))
    own = triton.next_power_of_2(rows)
    inner = torch.empty((rows, neurons), dtype=torch.float32, device=x.device)
    strips = triton.cdiv(columns, COLUMNS)
    blocks = triton.cdiv(neurons, NEURONS)
    width = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // strips))) * NEURONS
    splits = triton.cdiv(neurons, width)
    parts = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    options = {"ROWS": own, "NEURONS": NEURONS, "num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        gate_kernel[(blocks,)](
            x,
            gate,
            up,
            limit.contiguous(),
            inner,
            rows,
            neurons,
            size,
            x.stride(0),
            gate.stride(0),
            up.stride(0),
            ACTIVATION=ACTIVATIONS.index(activation),
            PRODUCT=product,
            INNER=INNER,
            **options,
        )
        down_kernel[(strips, splits)](
            inner,
            down_t,
            parts,
            rows,
            neurons,
            columns,
            width,
            down_t.stride(0),
            COLUMNS=COLUMNS,
            **options,
        )
    return parts.sum(0).to(x.dtype)
