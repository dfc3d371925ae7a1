"""`int4_matmul` in Triton: weights are made tile by tile on their way to the product.

A program takes a block of rows of x, a block of outputs and a part of the inputs; torch adds the
parts in their order. No atomics and no autotuning, so two runs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .int4_torch import WORD, blocked

ROWS = (16, 64)  # of x a program: for decoding, and for prompts
OUTPUTS = 64
INNER = 128
PROGRAMS = 512
WARPS = 4
STAGES = 3


@triton.jit
def int4_kernel(
    x,
    packed,
    scale,
    zero,
    parts,
    rows,
    outputs,
    size,
    words,
    groups,
    group_words,
    width,
    x_row,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write the sum over words [p * width, (p + 1) * width) to `parts` (p, rows, outputs)."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    output_in = output < outputs
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    part = tl.program_id(2)
    lane = tl.arange(0, INNER // 8)
    inner = tl.arange(0, INNER)
    shift = tl.arange(0, 8) * 4
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(part * width, tl.minimum((part + 1) * width, words), INNER // 8):
        word = start + lane
        inside = output_in[:, None] & (word < words)[None, :]
        place = output[:, None].to(tl.int64)
        held = tl.load(packed + place * words + word[None, :], mask=inside, other=0)
        value = ((held[:, :, None] >> shift[None, None, :]) & 15) - 8
        group = place * groups + (word // group_words)[None, :]
        if HAS_ZERO:
            own = tl.load(zero + group, mask=inside, other=0).to(tl.int32)
            value -= own[:, :, None]
        step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        weight = tl.reshape(value.to(tl.float32) * step[:, :, None], (OUTPUTS, INNER))
        column = start * 8 + inner
        left = tl.load(
            x + row[:, None].to(tl.int64) * x_row + column[None, :],
            mask=row_in[:, None] & (column < size)[None, :],
            other=0.0,
        )
        # Three TF32 products stand for a float32 one, with about its error.
        total = tl.dot(left, tl.trans(weight.to(left.dtype)), total, input_precision="tf32x3")
    place = (part * rows + row)[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(parts + place, total, mask=row_in[:, None] & output_in[None, :])


@torch.no_grad()
def tiled(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """(B, out)."""
    (rows, size), (outputs, words) = x.shape, packed.shape
    if not rows or not outputs or not words or x.dtype == torch.float64:
        return blocked(x, packed, scale, zero, group_size)
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    own = ROWS[0] if rows <= ROWS[0] else ROWS[1]
    grid = triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, own)
    steps = triton.cdiv(words * WORD, INNER)
    width = triton.cdiv(steps, max(1, min(steps, PROGRAMS // (grid[0] * grid[1]))))
    width *= INNER // WORD
    splits = triton.cdiv(words, width)
    parts = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        int4_kernel[(*grid, splits)](
            x,
            packed,
            scale,
            packed if zero is None else zero.contiguous(),
            parts,
            rows,
            outputs,
            size,
            words,
            scale.shape[1],
            triton.cdiv(min(group_size, words * WORD), WORD),
            width,
            x.stride(0),
            HAS_ZERO=zero is not None,
            ROWS=own,
            OUTPUTS=OUTPUTS,
            INNER=INNER,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
    return parts.sum(0).to(x.dtype)
