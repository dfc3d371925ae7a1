"""`k_center_step` in Triton: distance, running minimum and the best of each block in one kernel.

A program reads a block of rows once, lowers their distances and writes the highest of them with
its place; a second, of one program, finds the highest of those. No atomics and no autotuning, so
two runs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .centers_reference import SAME

ROWS = 64
INNER = 64
BLOCKS = 1024  # of the first kernel that the second takes at once
WARPS = 4


@triton.jit
def _first_highest(value, place, axis: tl.constexpr):
    """Highest value and its smallest place."""
    best = tl.max(value, axis)
    return best, tl.min(tl.where(value == best, place, 0x7FFFFFFFFFFFFFFF), axis)


@triton.jit(do_not_specialize=["number"])
def step_kernel(
    points,
    centre,
    distance,
    nearest,
    best,
    place,
    count,
    size,
    point_row,
    point_inner,
    centre_inner,
    number,
    SAME: tl.constexpr,
    HAS_NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Lower `distance` (count,); write each block's highest to `best`, its row to `place`."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = row < count
    inner = tl.arange(0, INNER)
    product = tl.zeros((ROWS, INNER), tl.float32)
    for start in range(0, size, INNER):
        column = start + inner
        inside = column < size
        part = tl.load(
            points + row[:, None] * point_row + column[None, :] * point_inner,
            mask=row_in[:, None] & inside[None, :],
            other=0.0,
        )
        wanted = tl.load(centre + column * centre_inner, mask=inside, other=0.0)
        product += part.to(tl.float32) * wanted.to(tl.float32)[None, :]
    away = 1.0 - tl.sum(product, 1)
    away = tl.where(away < SAME, 0.0, away)
    # Rows beyond the last count as chosen.
    known = tl.load(distance + row, mask=row_in, other=-1.0)
    closer = away < known
    known = tl.where(closer, away, known)
    tl.store(distance + row, known, mask=row_in)
    if HAS_NEAREST:
        own = tl.zeros((ROWS,), tl.int64) + number
        tl.store(nearest + row, own, mask=row_in & closer)
    highest, where = _first_highest(known, row, 0)
    tl.store(best + block, highest)
    tl.store(place + block, where)


@triton.jit
def combine_kernel(best, place, out_best, out_place, blocks, BLOCKS: tl.constexpr):
    """The highest of `blocks` pairs, ties to the smallest place."""
    lane = tl.arange(0, BLOCKS)
    value = tl.full((BLOCKS,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCKS,), tl.int64)
    for start in range(0, blocks, BLOCKS):
        inside = start + lane < blocks
        other = tl.load(best + start + lane, mask=inside, other=float("-inf"))
        # A lane's blocks come in ascending order of rows: the first of equals stays.
        higher = other > value
        where = tl.where(higher, tl.load(place + start + lane, mask=inside, other=0), where)
        value = tl.where(higher, other, value)
    highest, first = _first_highest(value, where, 0)
    tl.store(out_best, highest)
    tl.store(out_place, first)


@torch.no_grad()
def two_kernels(
    points: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    nearest: torch.Tensor | None,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(highest distance, its index); -inf where no row is left."""
    rows, size = points.shape
    blocks = triton.cdiv(rows, ROWS)
    best = distance.new_full((blocks + 1,), -torch.inf)
    place = torch.zeros_like(best, dtype=torch.int64)
    if not rows:
        return best[0], place[0]
    with torch.cuda.device_of(points):
        step_kernel[(blocks,)](
            points,
            centre,
            distance,
            place if nearest is None else nearest,
            best,
            place,
            rows,
            size,
            *points.stride(),
            *centre.stride(),
            number,
            SAME=SAME,
            HAS_NEAREST=nearest is not None,
            ROWS=ROWS,
            INNER=INNER,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        combine_kernel[(1,)](best, place, best[blocks:], place[blocks:], blocks, BLOCKS=BLOCKS)
    return best[blocks], place[blocks]
