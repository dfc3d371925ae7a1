"""`hadamard` in Triton: one read, a butterfly in registers, one write.

Each step parts even from odd coordinates and writes sums to the first half and differences to
the second, which turns the bits of the place by one: after log2(block) equal steps the order is
the old one. Additions alone, in float32. Blocks of more than 16,384 go to torch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .hadamard_torch import two_factors

LARGEST = 16384
CELLS = 2048  # of a program, where a block is smaller


@triton.jit
def butterfly_kernel(
    x,
    signs,
    out,
    rows,
    size,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate ROWS rows of one block of `x` (rows, size), contiguous, to `out`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row[:, None] * size + column[None, :]
    inside = (row < rows)[:, None] & (column < size)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SIGNS:
        turn = tl.load(signs + column).to(tl.float32)[None, :]
        if not INVERSE:
            value = value * turn
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(value, (ROWS, BLOCK // 2, 2)))
        both = tl.join(even + odd, even - odd)
        value = tl.reshape(tl.permute(both, (0, 2, 1)), (ROWS, BLOCK))
    value = value * scale
    if HAS_SIGNS and INVERSE:
        value = value * turn
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def tile(block: int) -> tuple[int, int]:
    """(rows, warps) of a program."""
    rows = max(1, CELLS // block)
    return rows, max(4, min(16, rows * block // 512))


@torch.no_grad()
def butterfly(
    x: torch.Tensor, block: int, signs: torch.Tensor | None, inverse: bool
) -> torch.Tensor:
    """(N, d) rotated."""
    rows, size = x.shape
    if not rows or not 2 <= block <= LARGEST or x.dtype == torch.float64:
        return two_factors(x, block, signs, inverse)
    x = x.contiguous()
    out = torch.empty_like(x)
    own, warps = tile(block)
    with torch.cuda.device_of(x):
        butterfly_kernel[(triton.cdiv(rows, own), size // block)](
            x,
            x if signs is None else signs.contiguous(),
            out,
            rows,
            size,
            1.0 / math.sqrt(block),
            ROWS=own,
            BLOCK=block,
            STEPS=block.bit_length() - 1,
            HAS_SIGNS=signs is not None,
            INVERSE=inverse,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return out
