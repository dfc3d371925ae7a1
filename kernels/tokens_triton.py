"""`token_stats` in Triton: the matrix product and its softmax in one kernel, forward only.

A program takes a block of rows and a part of the vocabulary, keeps (maximum, sum of exp, sum of
exp times shifted logit, the target's logit) while it walks over the part, and writes those four
numbers a row; a second kernel puts the parts together in their order. No atomics and no
autotuning, so two runs give the same bits. Memory beside the output: 16 bytes a row and part.

The rank takes a second walk over the same tiles, once the target's logit is known.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program's tiles."""

    rows: int
    entries: int
    inner: int
    warps: int
    stages: int


# By ptxas, the wide tile spills 64 bytes of registers on sm_90 and 632 on sm_80.
WIDE = Tiles(128, 256, 64, 8, 3)
HALF = Tiles(128, 128, 64, 8, 3)
SINGLE = Tiles(64, 64, 32, 4, 3)
GROUP = 16  # blocks of rows that walk the vocabulary together, so that its tiles are in L2
PROGRAMS = 128  # about as many at once as a large GPU has processors
COMBINE_ROWS = 128


@triton.jit
def _shifted(value):
    """`value`, and 0 where it is -inf: what exp(value) = 0 is to be multiplied by."""
    return tl.where(value == float("-inf"), 0.0, value)


@triton.jit
def _place(count, group, splits, ROWS: tl.constexpr):
    """(block of rows, part of the vocabulary) of this program: `group` blocks at a time."""
    program = tl.program_id(0)
    blocks = tl.cdiv(count, ROWS)
    first = program // (group * splits) * group
    size = tl.minimum(blocks - first, group)
    inside = program % (group * splits)
    return first + inside % size, inside // size


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    row,
    row_in,
    entry,
    vocabulary,
    size,
    hidden_row,
    hidden_inner,
    weight_row,
    weight_inner,
    scale,
    softcap,
    INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(rows, entries) float32 logits; -inf beyond the vocabulary."""
    entry_in = entry < vocabulary
    inner = tl.arange(0, INNER)
    left = hidden + row[:, None] * hidden_row + inner[None, :] * hidden_inner
    right = weight + entry[None, :].to(tl.int64) * weight_row + inner[:, None] * weight_inner
    logits = tl.zeros((row.shape[0], entry.shape[0]), tl.float32)
    for start in range(0, size, INNER):
        inner_in = inner < size - start
        a = tl.load(left, mask=row_in[:, None] & inner_in[None, :], other=0.0)
        b = tl.load(right, mask=entry_in[None, :] & inner_in[:, None], other=0.0)
        # Three TF32 products stand for a float32 one, with about its error.
        logits = tl.dot(a, b.to(a.dtype), logits, input_precision="tf32x3")
        left += INNER * hidden_inner
        right += INNER * weight_inner
    if HAS_BIAS:
        logits += tl.load(bias + entry, mask=entry_in, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if HAS_SOFTCAP:
        # tanh by exp, which the interpreter has too; exp -> inf and 0 give 1 and -1.
        logits = softcap * (1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0))
    return tl.where(entry_in[None, :], logits, float("-inf"))


@triton.jit
def stats_kernel(
    hidden,
    weight,
    bias,
    rows,
    targets,
    parts,
    count,
    vocabulary,
    size,
    hidden_row,
    hidden_inner,
    weight_row,
    weight_inner,
    scale,
    softcap,
    width,
    group,
    splits,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Write (maximum, sum of exp, sum of exp * shifted logit, target's logit) of each part.

    `parts` is (4, splits, count) float32; part p covers entries [p * width, (p + 1) * width).
    """
    block, part = _place(count, group, splits, ROWS)
    place = block * ROWS + tl.arange(0, ROWS)
    row_in = place < count
    row = tl.load(rows + place, mask=row_in, other=0)
    target = tl.load(targets + place, mask=row_in, other=-1)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    at_target = tl.zeros((ROWS,), tl.float32)
    for start in range(part * width, tl.minimum((part + 1) * width, vocabulary), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        logits = _logits(
            hidden,
            weight,
            bias,
            row,
            row_in,
            entry,
            vocabulary,
            size,
            hidden_row,
            hidden_inner,
            weight_row,
            weight_inner,
            scale,
            softcap,
            INNER,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        at_target += tl.sum(tl.where(entry[None, :] == target[:, None], logits, 0.0), 1)
        raised = tl.maximum(top, tl.max(logits, 1))
        shift = _shifted(raised)
        logits -= shift[:, None]
        exp = tl.exp(logits)
        down = top - shift
        factor = tl.exp(down)
        weighted = (weighted + total * _shifted(down)) * factor
        weighted += tl.sum(exp * _shifted(logits), 1)
        total = total * factor + tl.sum(exp, 1)
        top = raised
    out = parts + part * count + place
    step = splits * count
    tl.store(out, top, mask=row_in)
    tl.store(out + step, total, mask=row_in)
    tl.store(out + 2 * step, weighted, mask=row_in)
    tl.store(out + 3 * step, at_target, mask=row_in)


@triton.jit
def combine_kernel(parts, out, count, splits, ROWS: tl.constexpr):
    """`parts` (4, splits, count) to `out` (4, count): nll, entropy, lse, target's logit."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = place < count
    step = splits * count
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(splits):
        top = tl.maximum(top, tl.load(parts + part * count + place, mask=row_in, other=0.0))
    shift = _shifted(top)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    at_target = tl.zeros((ROWS,), tl.float32)
    for part in range(splits):
        start = parts + part * count + place
        down = tl.load(start, mask=row_in, other=0.0) - shift
        factor = tl.exp(down)
        own = tl.load(start + step, mask=row_in, other=1.0)
        total += own * factor
        own_weighted = tl.load(start + 2 * step, mask=row_in, other=0.0)
        weighted += (own_weighted + own * _shifted(down)) * factor
        at_target += tl.load(start + 3 * step, mask=row_in, other=0.0)
    log_total = tl.log(total)
    lse = top + log_total
    tl.store(out + place, lse - at_target, mask=row_in)
    tl.store(out + count + place, log_total - weighted / total, mask=row_in)
    tl.store(out + 2 * count + place, lse, mask=row_in)
    tl.store(out + 3 * count + place, at_target, mask=row_in)


@triton.jit
def rank_kernel(
    hidden,
    weight,
    bias,
    rows,
    at_target,
    above,
    count,
    vocabulary,
    size,
    hidden_row,
    hidden_inner,
    weight_row,
    weight_inner,
    scale,
    softcap,
    width,
    group,
    splits,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Write to `above` (splits, count) int32 how many entries of each part pass the target."""
    block, part = _place(count, group, splits, ROWS)
    place = block * ROWS + tl.arange(0, ROWS)
    row_in = place < count
    row = tl.load(rows + place, mask=row_in, other=0)
    own = tl.load(at_target + place, mask=row_in, other=0.0)
    counted = tl.zeros((ROWS,), tl.int32)
    for start in range(part * width, tl.minimum((part + 1) * width, vocabulary), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        logits = _logits(
            hidden,
            weight,
            bias,
            row,
            row_in,
            entry,
            vocabulary,
            size,
            hidden_row,
            hidden_inner,
            weight_row,
            weight_inner,
            scale,
            softcap,
            INNER,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        counted += tl.sum((logits > own[:, None]).to(tl.int32), 1)
    tl.store(above + part * count + place, counted, mask=row_in)


def pick_tiles(states: torch.Tensor) -> Tiles:
    """Tiles for the dtype and the device of `states`."""
    if states.dtype == torch.float32:
        return SINGLE
    hopper = states.is_cuda and torch.cuda.get_device_capability(states.device)[0] >= 9
    return WIDE if hopper else HALF


@torch.no_grad()
def fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, entropy, lse, rank) of `hidden`'s `rows`, each (len(rows),); rank 0 if unasked."""
    count, (vocabulary, size) = len(rows), weight.shape
    out = hidden.new_empty((4, count), dtype=torch.float32)
    above = torch.zeros_like(targets)
    if not count:
        return out[0], out[1], out[2], above
    # Weights are brought to the states' dtype tile by tile, so that must hold both.
    common = torch.promote_types(hidden.dtype, weight.dtype)
    states = hidden.to(torch.float32 if common == torch.float64 else common)
    tiles = pick_tiles(states)
    blocks = triton.cdiv(count, tiles.rows)
    group = min(blocks, GROUP)
    most = triton.cdiv(vocabulary, tiles.entries)
    width = triton.cdiv(most, min(most, triton.cdiv(PROGRAMS, group))) * tiles.entries
    splits = triton.cdiv(vocabulary, width)
    parts = hidden.new_empty((4, splits, count), dtype=torch.float32)

    def walk(kernel, given: torch.Tensor, made: torch.Tensor) -> None:
        kernel[(blocks * splits,)](
            states,
            weight,
            weight if bias is None else bias,
            rows,
            given,
            made,
            count,
            vocabulary,
            size,
            *states.stride(),
            *weight.stride(),
            float(scale),
            float(softcap or 1.0),
            width,
            group,
            splits,
            ROWS=tiles.rows,
            ENTRIES=tiles.entries,
            INNER=tiles.inner,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=False,
        )

    with torch.cuda.device_of(hidden):
        walk(stats_kernel, targets, parts)
        grid = (triton.cdiv(count, COMBINE_ROWS),)
        combine_kernel[grid](parts, out, count, splits, ROWS=COMBINE_ROWS, enable_fp_fusion=False)
        if rank:
            counts = hidden.new_empty((splits, count), dtype=torch.int32)
            walk(rank_kernel, out[3], counts)
            above = counts.sum(0, dtype=torch.int64)
    return out[0], out[1], out[2], above
