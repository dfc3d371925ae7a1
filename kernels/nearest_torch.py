"""`pairwise_topk` in torch: blocks of values, and keys that sort by value and then by index.

Keys are made of those values of a block alone that pass the worst of the k best so far: few, but
for the first block, whose own k-th best is the bar. So most of a block costs its product and one
comparison.
"""

from __future__ import annotations

import torch

CPU_BLOCK = (512, 1 << 22)  # queries, and float32 cells: 16 MiB
GPU_BLOCK = (4096, 1 << 24)  # 64 MiB
_LOW = 0xFFFFFFFF


def keys_of(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """int64 keys of float32 values and their indices: higher value, then smaller index, first.

    -0.0 must not be among the values: its key is below that of 0.0.
    """
    bits = values.view(torch.int32)
    return (_ordered(bits).long() << 32) | (_LOW - indices)


def of_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) of keys."""
    return _ordered((keys >> 32).int()).view(torch.float32), _LOW - (keys & _LOW)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits of a float32 as whole numbers in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def no_keys(rows: int, k: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, k) keys of -inf, distinct, after every other."""
    place = torch.arange(_LOW - k + 1, _LOW + 1, device=like.device)
    values = torch.full((rows, k), -torch.inf, device=like.device)
    return keys_of(values, place)


@torch.no_grad()
def blocked(
    queries: torch.Tensor, points: torch.Tensor, k: int, near: bool, exclude: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices); with `near`, values are negative squared distances."""
    most, cells = GPU_BLOCK if queries.is_cuda else CPU_BLOCK
    most = max(1, min(most, len(queries)))
    # As few that float32 copies of the points, and their squares, are no larger than a block.
    width = max(1, min(len(points), cells // max(most, points.shape[1])))
    best = no_keys(len(queries), k, queries)
    scratch = queries.new_empty(most * width, dtype=torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, len(points), width):
            part = points[first : first + width].float()
            lengths = part.square().sum(1) if near else None
            for start in range(0, len(queries), most):
                rows = slice(start, start + most)
                some = queries[rows].float()
                values = scratch[: len(some) * len(part)].view(len(some), len(part))
                _fill(values, some, part, lengths)
                if exclude is not None:
                    _leave_out(values, exclude[rows] - first)
                found = torch.cat([best[rows], _better_keys(values, best[rows], first)], 1)
                best[rows] = found.topk(k, 1).values
    return of_keys(best)


def _fill(
    values: torch.Tensor, queries: torch.Tensor, points: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    """Write products, or with `lengths` negative squared distances, to `values` (n, m)."""
    torch.mm(queries, points.T, out=values)
    if lengths is not None:
        values.mul_(2.0).sub_(lengths).sub_(queries.square().sum(1, keepdim=True)).clamp_(max=0.0)


def _leave_out(values: torch.Tensor, column: torch.Tensor) -> None:
    """Set values[row, column[row]] to -inf where there is such a column."""
    inside = (column >= 0) & (column < values.shape[1])
    rows = inside.nonzero().squeeze(1)
    values[rows, column[rows]] = -torch.inf


def _better_keys(values: torch.Tensor, best: torch.Tensor, first: int) -> torch.Tensor:
    """Keys of what may be among the best k of each row, filled up to one width with no keys.

    `values` (n, m) of points `first` and on; `best` (n, k) keys of the points before those, so
    an equal value is no better. NaN and -inf never are.
    """
    rows, k = best.shape
    better = values > of_keys(best[:, -1:])[0]
    if values.shape[1] > k and int(better.count_nonzero()) > 2 * k * rows:
        # Most of them are not among the best of this block. Those equal to the k-th of it stay.
        finite = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        better &= values >= finite.topk(k, 1).values[:, -1:]
    row, column = better.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys = no_keys(rows, int(counts.max()) if rows else 0, values)
    keys[row, place] = keys_of(values[row, column] + 0.0, column + first)
    return keys
