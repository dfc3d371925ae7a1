"""`wanda_mask` in torch: blocks of rows, a histogram of the scores' leading bits.

Scores are at least 0, so their float32 bits are whole numbers in the same order. A row's bits are
counted in buckets of 1/64 of a power of two below its highest; the bucket that holds the border
is found from the counts, everything above it stays, and what is inside it (about 0.5 % of a
normal row) is sorted. Where that is much, because scores are equal or many are 0, and for narrow
rows, the border is found by a partial sort of whole rows instead. That one alone runs on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch

CELLS = 1 << 20  # of a block: 4 MiB of float32
GPU_CELLS = 1 << 26
BUCKETS = 1024
SHIFT = 17  # float32 bits dropped: 6 of the mantissa's 23 are left
NARROW = 1536  # rows under it: counting their buckets costs more than a partial sort
MANY = 16  # a block with more than 1 / MANY of its cells at the border is sorted
WIDE = 8  # groups of more are sorted: the pairs to compare grow with the square
INFINITE = 0x7F800000  # the bits of infinity; a NaN's are above


@torch.no_grad()
def blocked(
    weight: torch.Tensor,
    norm: torch.Tensor,
    count: int,
    pattern: tuple[int, int] | None,
    packed: bool,
) -> tuple[torch.Tensor, bool]:
    """(mask or its bits, whether all scores are finite)."""
    rows, size = weight.shape
    width = -(-size // 8) if packed else size
    out = torch.empty(
        (rows, width), dtype=torch.uint8 if packed else torch.bool, device=weight.device
    )
    cells = GPU_CELLS if weight.is_cuda else CELLS
    step = max(1, cells // max(1, size))
    scale, highest = norm.float(), 0
    # One buffer for all blocks: a fresh one would be paged in each time.
    buffer = torch.empty((min(step, rows), size), dtype=torch.float32, device=weight.device)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        score = buffer[: len(part)]
        # abs last: inf * 0 is a NaN with its sign set.
        score.copy_(part).mul_(scale).abs_()
        bits = score.view(torch.int32)
        if bits.numel():
            highest = max(highest, int(bits.max()))
        if highest >= INFINITE:
            return out, False
        mask = highest_of(bits, count) if pattern is None else ranked(score, *pattern)
        out[start : start + step] = pack(mask) if packed else mask
    return out, True


def highest_of(bits: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` highest of each row of `bits` (R, in) int32, the leftmost of equals."""
    size = bits.shape[1]
    if count <= 0 or count >= size:
        return torch.full_like(bits, count >= size, dtype=torch.bool)
    mask = None if bits.is_cuda or size < NARROW else _counted(bits, count)
    return _partly_sorted(bits, count) if mask is None else mask


def _counted(bits: torch.Tensor, count: int) -> torch.Tensor | None:
    """The mask by way of a histogram; None where the border's bucket holds too much."""
    rows = len(bits)
    base = bits.amax(1, keepdim=True).bitwise_right_shift_(SHIFT).sub_(BUCKETS - 1)
    bucket = (bits >> SHIFT).sub_(base).clamp_(min=0)
    offset = torch.arange(rows, dtype=torch.int32)[:, None] * BUCKETS
    bucket.add_(offset)
    held = torch.bincount(bucket.view(-1), minlength=rows * BUCKETS).view(rows, BUCKETS)
    # below[b]: how many lie under bucket b. The border is the last with fewer than are dropped.
    below = held.cumsum(1).sub_(held)
    border = (below <= bits.shape[1] - count).sum(1, keepdim=True).sub_(1)
    inside, under = held.gather(1, border), below.gather(1, border)
    if int(inside.sum()) * MANY > bits.numel():
        return None
    edge = border.int().add_(offset)
    mask = bucket > edge
    need = count - (bits.shape[1] - under - inside)
    row, column = (bucket == edge).nonzero(as_tuple=True)
    _settle(mask, bits, row, column, need[:, 0])
    return mask


def _settle(
    mask: torch.Tensor,
    bits: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    need: torch.Tensor,
) -> None:
    """Set the `need` (R,) highest of each row's candidates, which come row by row."""
    # Row, then highest first; a stable sort leaves the smaller column first among equals.
    key = (row << 32) - bits[row, column]
    order = torch.argsort(key, stable=True)
    row, column = row[order], column[order]
    first = torch.searchsorted(row, torch.arange(len(need)))
    stays = torch.arange(len(row)) - first[row] < need[row]
    mask[row[stays], column[stays]] = True


def _partly_sorted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The mask by way of each row's count-th highest."""
    drop = bits.shape[1] - count
    if count <= drop + 1:
        border = bits.topk(count, 1, sorted=False).values.amin(1, keepdim=True)
    else:
        border = bits.topk(drop + 1, 1, largest=False, sorted=False).values.amax(1, keepdim=True)
    mask = bits >= border
    extra = mask.sum(1) - count
    tied = extra.nonzero().squeeze(1)
    if len(tied):
        some, edge = bits[tied], border[tied]
        equal = some == edge
        room = (equal.sum(1) - extra[tied])[:, None]
        left = equal.cumsum(1, dtype=torch.int32) <= room
        mask[tied] = (some > edge) | (equal & left)
    return mask


def ranked(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True at the n highest of each m consecutive columns, the leftmost of equals."""
    groups = score.reshape(-1, m)
    if m > WIDE:
        return highest_of(groups.view(torch.int32), n).view(score.shape)
    lanes = groups.unbind(1)
    # rank[i]: how many are before i. Each pair is compared once, and says so to both.
    rank = torch.zeros((m, len(groups)), dtype=torch.uint8, device=score.device)
    for i in range(m):
        for j in range(i + 1, m):
            later = lanes[j] > lanes[i]
            rank[i] += later.view(torch.uint8)
            rank[j] += later.logical_not_().view(torch.uint8)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=score.device)
    return torch.lt(rank.T, n, out=mask).view(score.shape)


@torch.no_grad()
def add_squares(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add the columns' sums of squares of x (T, in) to `out` (in,) float32."""
    rows, size = x.shape
    step = max(1, (GPU_CELLS if x.is_cuda else CELLS) // max(1, size))
    buffer = torch.empty((min(step, rows), size), dtype=torch.float32, device=x.device)
    for start in range(0, rows, step):
        part = x[start : start + step]
        squares = buffer[: len(part)]
        squares.copy_(part)
        out += torch.mul(squares, squares, out=squares).sum(0)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """(R, in) bool to (R, ceil(in / 8)) uint8, the smallest column in the lowest bit."""
    if not mask.is_cuda:
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    padded = torch.nn.functional.pad(mask.byte(), (0, -mask.shape[1] % 8))
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(len(mask), -1, 8) << place).sum(2, dtype=torch.uint8)


def unpack(bits: torch.Tensor, size: int) -> torch.Tensor:
    """(R, size) bool of what `pack` made."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    apart = (bits[:, :, None] >> place) & 1
    return apart.view(len(bits), -1)[:, :size].bool()
