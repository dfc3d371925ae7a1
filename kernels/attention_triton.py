"""`attention_mass` in Triton: one kernel for the rows' log-sum-exps, one for the columns.

The first walks over the keys of a block of queries with an online maximum, for all keys and for
the chosen ones at once; where the blocks of queries are few (a short window over long keys) the
keys are split among programs, and a small kernel puts the parts together in their order. The
second takes a block of keys and walks over the queries, whose log-sum-exps it knows. No atomics
and no autotuning, so two runs give the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_reference import Sight

PROGRAMS = 256  # enough to fill a large GPU
COMBINE_ROWS = 128
WARPS = 4
STAGES = 3


@triton.jit
def _finite(value):
    """`value`, and 0 where it is -inf: a shift that leaves exp(-inf - shift) = 0."""
    return tl.where(value == float("-inf"), 0.0, value)


@triton.jit
def _place(count, BLOCK: tl.constexpr):
    """(block, pair of batch item and head) of this program; the pair is int64 for offsets."""
    program = tl.program_id(0)
    blocks = tl.cdiv(count, BLOCK)
    return program % blocks, (program // blocks).to(tl.int64)


@triton.jit
def _tile(pointer, place, inside, step, inner_step, size, INNER: tl.constexpr):
    """(len(place), INNER) vectors, 0 outside."""
    inner = tl.arange(0, INNER)
    return tl.load(
        pointer + place[:, None].to(tl.int64) * step + inner[None, :] * inner_step,
        mask=inside[:, None] & (inner < size)[None, :],
        other=0.0,
    )


@triton.jit
def _logits(
    query,
    key,
    row,
    column,
    row_segment,
    key_segment,
    queries,
    keys,
    scale,
    window,
    softcap,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """(rows, columns) float32 logits, -inf where the query may not see the key."""
    # Three TF32 products stand for a float32 one, with about its error; half precision is exact.
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
    if SOFTCAP:
        logits = softcap * (1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0))
    distance = (row + keys - queries)[:, None] - column[None, :]
    seen = (row < queries)[:, None] & (column < keys)[None, :]
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window)
    if SEGMENTS:
        other = tl.load(key_segment + column, mask=column < keys, other=-1)
        seen = seen & (row_segment[:, None] == other[None, :]) & (row_segment >= 0)[:, None]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def row_kernel(
    query,
    key,
    query_rows,
    key_columns,
    query_segment,
    key_segment,
    parts,
    heads,
    shared,
    queries,
    keys,
    size,
    query_batch,
    query_head,
    query_row,
    query_inner,
    key_batch,
    key_head,
    key_row,
    key_inner,
    scale,
    window,
    softcap,
    width,
    rows_total,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INNER: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Write (maximum, sum of exp, that of the chosen keys) of each part of the keys.

    `parts` is (3, splits, B * H * Q) float32; part p covers keys [p * width, (p + 1) * width).
    """
    block, pair = _place(queries, ROWS)
    item = pair // heads
    head = pair % heads
    part = tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    row_in = row < queries
    chosen = tl.load(query_rows + item * queries + row, mask=row_in, other=0)
    own = row
    if SEGMENTS:
        own = tl.load(query_segment + item * queries + row, mask=row_in, other=-1)
    query += item * query_batch + head * query_head
    key += item * key_batch + head // shared * key_head
    states = _tile(query, row, row_in, query_row, query_inner, size, INNER)
    first = part * width
    last = tl.minimum(first + width, keys)
    position = block * ROWS + keys - queries  # of the block's first query
    if CAUSAL:
        last = tl.minimum(last, position + ROWS)
    if WINDOW:
        first = tl.maximum(first, (position - window + 1) // KEYS * KEYS)
    last = tl.where(tl.max(chosen.to(tl.int32), 0) > 0, last, first)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, KEYS):
        column = start + tl.arange(0, KEYS)
        logits = _logits(
            states,
            _tile(key, column, column < keys, key_row, key_inner, size, INNER),
            row,
            column,
            own,
            key_segment + item * keys,
            queries,
            keys,
            scale,
            window,
            softcap,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            SEGMENTS,
        )
        raised = tl.maximum(top, tl.max(logits, 1))
        shift = _finite(raised)
        factor = tl.exp(top - shift)
        exp = tl.exp(logits - shift[:, None])
        wanted = tl.load(key_columns + item * keys + column, mask=column < keys, other=0)
        total = total * factor + tl.sum(exp, 1)
        mass = mass * factor + tl.sum(tl.where((wanted != 0)[None, :], exp, 0.0), 1)
        top = raised
    out = parts + part * rows_total + pair * queries + row
    step = tl.num_programs(1) * rows_total
    tl.store(out, top, mask=row_in)
    tl.store(out + step, total, mask=row_in)
    tl.store(out + 2 * step, mass, mask=row_in)


@triton.jit
def combine_kernel(parts, row, lse, rows_total, splits, ROWS: tl.constexpr):
    """`parts` to the mass `row` and log-sum-exp `lse`, both (B * H * Q,) float32.

    A query that sees nothing gets mass 0 and lse inf, which makes its column weights 0.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = place < rows_total
    step = splits * rows_total
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(splits):
        top = tl.maximum(top, tl.load(parts + part * rows_total + place, mask=row_in, other=0.0))
    shift = _finite(top)
    total = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for part in range(splits):
        start = parts + part * rows_total + place
        factor = tl.exp(tl.load(start, mask=row_in, other=0.0) - shift)
        total += tl.load(start + step, mask=row_in, other=0.0) * factor
        mass += tl.load(start + 2 * step, mask=row_in, other=0.0) * factor
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    tl.store(row + place, mass / safe, mask=row_in)
    tl.store(lse + place, tl.where(blind, float("inf"), shift + tl.log(safe)), mask=row_in)


@triton.jit
def column_kernel(
    query,
    key,
    query_rows,
    lse,
    query_segment,
    key_segment,
    out,
    heads,
    shared,
    queries,
    keys,
    size,
    query_batch,
    query_head,
    query_row,
    query_inner,
    key_batch,
    key_head,
    key_row,
    key_inner,
    scale,
    window,
    softcap,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INNER: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Write the sums of a block of columns to `out` (B * H * K,) float32."""
    block, pair = _place(keys, KEYS)
    item = pair // heads
    head = pair % heads
    begin = block * KEYS
    column = begin + tl.arange(0, KEYS)
    column_in = column < keys
    query += item * query_batch + head * query_head
    key += item * key_batch + head // shared * key_head
    vectors = _tile(key, column, column_in, key_row, key_inner, size, INNER)
    first = 0
    last = queries
    ahead = keys - queries
    if CAUSAL:
        first = tl.maximum(0, begin - ahead) // ROWS * ROWS
    if WINDOW:
        last = tl.minimum(last, begin + KEYS - 1 + window - ahead)
    sums = tl.zeros((KEYS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_in = row < queries
        chosen = tl.load(query_rows + item * queries + row, mask=row_in, other=0)
        own = row
        if SEGMENTS:
            own = tl.load(query_segment + item * queries + row, mask=row_in, other=-1)
        logits = _logits(
            _tile(query, row, row_in, query_row, query_inner, size, INNER),
            vectors,
            row,
            column,
            own,
            key_segment + item * keys,
            queries,
            keys,
            scale,
            window,
            softcap,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            SEGMENTS,
        )
        known = tl.load(lse + pair * queries + row, mask=row_in, other=float("inf"))
        weight = tl.exp(logits - known[:, None])
        sums += tl.sum(tl.where((chosen != 0)[:, None], weight, 0.0), 0)
    tl.store(out + pair * keys + column, sums, mask=column_in)


def tile_sizes(inner: int, bytes_a_number: int) -> tuple[int, int]:
    """(queries, keys) of a tile: 16 to 64 and 16 to 128, and at most 16 and 32 KiB.

    float32 takes half the keys: three products for one need the registers.
    """
    vector = inner * bytes_a_number
    most = 128 if bytes_a_number == 2 else 64
    return min(64, max(16, (1 << 14) // vector)), min(most, max(16, (1 << 15) // vector))


@torch.no_grad()
def two_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    query_rows: torch.Tensor | None,
    key_columns: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sight: Sight,
    columns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(row, column)."""
    common = torch.promote_types(query.dtype, key.dtype)
    common = torch.float32 if common == torch.float64 else common
    query, key = query.to(common), key.to(common)
    batch, heads, queries, size = query.shape
    keys = sight.keys
    row = query.new_zeros((batch, heads, queries), dtype=torch.float32)
    column = query.new_zeros((batch, heads, keys), dtype=torch.float32) if columns else None
    if not row.numel() or not keys:
        return row, column
    inner = max(16, triton.next_power_of_2(size))
    tile_rows, tile_keys = tile_sizes(inner, query.element_size())
    blocks, pairs = triton.cdiv(queries, tile_rows), batch * heads
    most = triton.cdiv(keys, tile_keys)
    splits = min(most, triton.cdiv(PROGRAMS, blocks * pairs))
    width = triton.cdiv(most, splits) * tile_keys
    splits = triton.cdiv(keys, width)
    parts = query.new_empty((3, splits, row.numel()), dtype=torch.float32)
    lse = torch.empty_like(row)
    chosen = _bytes(query_rows, (batch, queries), query)
    segments = (sight.query_segment, sight.key_segment)
    # Without segments any pointer will do: it is not read.
    sides = [chosen if one is None else one.contiguous() for one in segments]
    shape = (heads, heads // key.shape[1], queries, keys, size, *query.stride(), *key.stride())
    numbers = (float(scale), sight.window or 0, float(softcap or 1.0))
    fixed = {
        "ROWS": tile_rows,
        "KEYS": tile_keys,
        "INNER": inner,
        "CAUSAL": sight.causal,
        "WINDOW": sight.window is not None,
        "SOFTCAP": softcap is not None,
        "SEGMENTS": sight.query_segment is not None,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(query):
        row_kernel[(blocks * pairs, splits)](
            query,
            key,
            chosen,
            _bytes(key_columns, (batch, keys), query),
            *sides,
            parts,
            *shape,
            *numbers,
            width,
            row.numel(),
            **fixed,
        )
        grid = (triton.cdiv(row.numel(), COMBINE_ROWS),)
        combine_kernel[grid](
            parts, row, lse, row.numel(), splits, ROWS=COMBINE_ROWS, enable_fp_fusion=False
        )
        if column is not None:
            column_kernel[(most * pairs,)](
                query, key, chosen, lse, *sides, column, *shape, *numbers, **fixed
            )
    if query_rows is not None:
        row.masked_fill_(~query_rows[:, None], 0.0)
    return row, column


def _bytes(mask: torch.Tensor | None, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """`mask` as contiguous int8, all 1 where it is None."""
    if mask is None:
        return torch.ones(shape, dtype=torch.int8, device=like.device)
    return mask.to(torch.int8).contiguous()
