"""`wanda_mask` in Triton: one read of the weights, the mask or its bits written once.

Row share: a program holds the bits of a row's scores in registers and finds the border from the
highest bit down, one count a bit; equal scores are then numbered from the left. N:M: a program
ranks each weight among the m of its group by comparing all pairs. No sort, no atomics and no
autotuning. Rows of more than 65,536 inputs go to torch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .wanda_torch import INFINITE, blocked, pack

LONGEST = 65536
GROUPS = 256  # of N:M, a program
PAIRS = 8192  # cells of a program's comparisons, which bound GROUPS for a large m


@triton.jit
def _score_bits(weight, norm, inside):
    """float32 bits of |weight| * norm, whole numbers in the scores' order; -1 outside."""
    score = tl.abs(weight.to(tl.float32) * norm.to(tl.float32))
    return tl.where(inside, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _to_bytes(kept, BYTES: tl.constexpr):
    """(BYTES,) of 8 * BYTES booleans, the first in the lowest bit."""
    lane = tl.arange(0, 8)
    return tl.sum(tl.reshape(kept.to(tl.int32), (BYTES, 8)) << lane[None, :], 1)


@triton.jit
def row_kernel(
    weight,
    norm,
    out,
    highest,
    size,
    count,
    width,
    weight_row,
    weight_inner,
    norm_inner,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write a row's mask to `out` (rows, width) uint8, its highest bits to `highest` (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    part = tl.load(weight + row * weight_row + column * weight_inner, mask=inside, other=0.0)
    bits = _score_bits(part, tl.load(norm + column * norm_inner, mask=inside, other=0.0), inside)
    tl.store(highest + row, tl.max(bits, 0))
    border = tl.full((), 0, tl.int32)
    for step in range(31):
        raised = border + (1 << (30 - step))
        border = tl.where(tl.sum((bits >= raised).to(tl.int32), 0) >= count, raised, border)
    above = bits > border
    equal = bits == border
    room = count - tl.sum(above.to(tl.int32), 0)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    kept = kept & inside
    if PACKED:
        place = tl.arange(0, BLOCK // 8)
        made = _to_bytes(kept, BLOCK // 8).to(tl.uint8)
        tl.store(out + row * width + place, made, mask=place < width)
    else:
        tl.store(out + row * width + column, kept.to(tl.uint8), mask=inside)


@triton.jit
def group_kernel(
    weight,
    norm,
    out,
    highest,
    size,
    groups,
    n,
    m,
    weight_row,
    weight_inner,
    norm_inner,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the N:M mask of a row's `groups` to `out` (rows, size) uint8.

    `highest` is (rows, parts): the highest bits of what each program saw.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    group = part * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    column = group[:, None] * m + lane[None, :]
    inside = (group < groups)[:, None] & (lane < m)[None, :]
    own = tl.load(weight + row * weight_row + column * weight_inner, mask=inside, other=0.0)
    bits = _score_bits(own, tl.load(norm + column * norm_inner, mask=inside, other=0.0), inside)
    tl.store(highest + row * tl.num_programs(1) + part, tl.max(tl.max(bits, 1), 0))
    mine, other = bits[:, :, None], bits[:, None, :]
    before = (other > mine) | ((other == mine) & (lane[None, :] < lane[:, None])[None, :, :])
    rank = tl.sum(before.to(tl.int32), 2)
    tl.store(out + row * size + column, (rank < n).to(tl.uint8), mask=inside)


def row_warps(block: int) -> int:
    """Warps of a row's program: 32 cells or fewer a thread, up to 65,536 columns by 32 warps."""
    return max(1, min(32, block // 1024))


def group_tile(m: int) -> tuple[int, int]:
    """(groups a program, lanes a group) for groups of m."""
    lanes = triton.next_power_of_2(m)
    return max(1, min(GROUPS, PAIRS // (lanes * lanes))), lanes


@torch.no_grad()
def masked(
    weight: torch.Tensor,
    norm: torch.Tensor,
    count: int,
    pattern: tuple[int, int] | None,
    packed: bool,
) -> tuple[torch.Tensor, bool]:
    """(mask or its bits, whether all scores are finite)."""
    rows, size = weight.shape
    if not rows or not size or weight.dtype == torch.float64 or size > LONGEST:
        return blocked(weight, norm, count, pattern, packed)
    norm = norm.float()
    with torch.cuda.device_of(weight):
        if pattern is not None:
            mask, highest = _grouped(weight, norm, *pattern)
            return (pack(mask) if packed else mask), int(highest.max()) < INFINITE
        block = max(16, triton.next_power_of_2(size))
        width = -(-size // 8) if packed else size
        out = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
        highest = torch.empty(rows, dtype=torch.int32, device=weight.device)
        row_kernel[(rows,)](
            weight,
            norm,
            out,
            highest,
            size,
            count,
            width,
            *weight.stride(),
            *norm.stride(),
            BLOCK=block,
            PACKED=packed,
            num_warps=row_warps(block),
            enable_fp_fusion=False,
        )
    return (out if packed else out.view(torch.bool)), int(highest.max()) < INFINITE


def _grouped(
    weight: torch.Tensor, norm: torch.Tensor, n: int, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, highest bits) of an N:M pattern."""
    rows, size = weight.shape
    groups = size // m
    tile, lanes = group_tile(m)
    parts = triton.cdiv(groups, tile)
    out = torch.empty((rows, size), dtype=torch.uint8, device=weight.device)
    highest = torch.empty((rows, parts), dtype=torch.int32, device=weight.device)
    group_kernel[(rows, parts)](
        weight,
        norm,
        out,
        highest,
        size,
        groups,
        n,
        m,
        *weight.stride(),
        *norm.stride(),
        GROUPS=tile,
        LANES=lanes,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out.view(torch.bool), highest
