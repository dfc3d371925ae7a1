"""`pairwise_topk` in Triton: a kernel makes a block of sortable keys, of which the best are kept.

A key is the value's 32 bits in the order of floats over the point's index from the far end: keys
differ, and the highest is the best value with the smallest index. So the choice hangs on nothing
but the values, whichever way `torch.topk` finds the highest keys. No atomics, no autotuning.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .nearest_torch import no_keys, of_keys

BLOCK = (1024, 1 << 23)  # queries, and 64-bit keys: 64 MiB
WARPS = 8
STAGES = 3


@triton.jit
def key_kernel(
    queries,
    points,
    exclude,
    keys,
    count,
    first,
    last,
    size,
    query_row,
    query_inner,
    point_row,
    point_inner,
    NEAR: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    POINTS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write the keys of `count` queries and points first to last - 1 to `keys`, row by row."""
    place = first + tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = row < count
    place_in = place < last
    inner = tl.arange(0, INNER)
    left = queries + row[:, None] * query_row + inner[None, :] * query_inner
    right = points + place[None, :] * point_row + inner[:, None] * point_inner
    value = tl.zeros((ROWS, POINTS), tl.float32)
    query_length = tl.zeros((ROWS,), tl.float32)
    point_length = tl.zeros((POINTS,), tl.float32)
    for start in range(0, size, INNER):
        inside = inner < size - start
        a = tl.load(left, mask=row_in[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=place_in[None, :] & inside[:, None], other=0.0)
        # Three TF32 products stand for a float32 one, with about its error.
        value = tl.dot(a, b, value, input_precision="tf32x3")
        if NEAR:
            wide = a.to(tl.float32)
            query_length += tl.sum(wide * wide, 1)
            wide = b.to(tl.float32)
            point_length += tl.sum(wide * wide, 0)
        left += INNER * query_inner
        right += INNER * point_inner
    if NEAR:
        value = 2.0 * value - point_length[None, :] - query_length[:, None]
        value = tl.where(value > 0.0, 0.0, value)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 is no other value
    value = tl.where(value == value, value, float("-inf"))
    if HAS_EXCLUDE:
        own = tl.load(exclude + row, mask=row_in, other=-1)
        value = tl.where(place[None, :] == own[:, None], float("-inf"), value)
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (0xFFFFFFFF - place)[None, :]
    out = keys + row[:, None] * (last - first) + (place - first)[None, :]
    tl.store(out, key, mask=row_in[:, None] & place_in[None, :])


def tile_sizes(bytes_a_number: int) -> tuple[int, int, int]:
    """(queries, points, coordinates) of a tile; three products for one need the registers."""
    return (64, 64, 32) if bytes_a_number == 4 else (128, 128, 64)


@torch.no_grad()
def keyed(
    queries: torch.Tensor, points: torch.Tensor, k: int, near: bool, exclude: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices); with `near`, values are negative squared distances."""
    common = torch.promote_types(queries.dtype, points.dtype)
    common = torch.float32 if common == torch.float64 else common
    queries, points = queries.to(common), points.to(common)
    most, cells = BLOCK
    most = max(1, min(most, len(queries)))
    width = max(1, min(len(points), cells // most))
    tile_rows, tile_points, inner = tile_sizes(queries.element_size())
    best = no_keys(len(queries), k, queries)
    scratch = torch.empty(most * width, dtype=torch.int64, device=queries.device)
    excluded = None if exclude is None else exclude.contiguous()
    for start in range(0, len(queries), most):
        rows = queries[start : start + most]
        kept = best[start : start + most]
        own = kept if excluded is None else excluded[start : start + most]
        for first in range(0, len(points), width):
            last = min(first + width, len(points))
            keys = scratch[: len(rows) * (last - first)].view(len(rows), last - first)
            grid = (triton.cdiv(last - first, tile_points), triton.cdiv(len(rows), tile_rows))
            with torch.cuda.device_of(queries):
                key_kernel[grid](
                    rows,
                    points,
                    own,
                    keys,
                    len(rows),
                    first,
                    last,
                    queries.shape[1],
                    *rows.stride(),
                    *points.stride(),
                    NEAR=near,
                    HAS_EXCLUDE=exclude is not None,
                    ROWS=tile_rows,
                    POINTS=tile_points,
                    INNER=inner,
                    num_warps=WARPS,
                    num_stages=STAGES,
                    enable_fp_fusion=False,
                )
            top = keys.topk(min(k, keys.shape[1]), 1).values
            kept.copy_(torch.cat([kept, top], 1).topk(k, 1).values)
    return of_keys(best)
