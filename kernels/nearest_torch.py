"""`pairwise_topk` in torch: blocks of values, and keys that sort by value and then by index.

The best of a block are found by value. Keys are made of those alone, 2 k a row, which costs little
beside the block, and of a whole row where its border is tied, which `torch.topk` may cut anywhere.
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
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, len(points), width):
            part = points[first : first + width].float()
            lengths = part.square().sum(1) if near else None
            for start in range(0, len(queries), most):
                rows = slice(start, start + most)
                values = _values(queries[rows].float(), part, lengths)
                if exclude is not None:
                    _leave_out(values, exclude[rows] - first)
                found = torch.cat([best[rows], _top_keys(values, k, first)], 1)
                best[rows] = found.topk(k, 1).values
    return of_keys(best)


def _values(
    queries: torch.Tensor, points: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """(rows, points) float32, -inf in place of NaN."""
    values = queries @ points.T
    if lengths is not None:
        values.mul_(2.0).sub_(lengths).sub_(queries.square().sum(1, keepdim=True)).clamp_(max=0.0)
    return values.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _leave_out(values: torch.Tensor, column: torch.Tensor) -> None:
    """Set values[row, column[row]] to -inf where there is such a column."""
    inside = (column >= 0) & (column < values.shape[1])
    rows = inside.nonzero().squeeze(1)
    values[rows, column[rows]] = -torch.inf


def _top_keys(values: torch.Tensor, k: int, first: int) -> torch.Tensor:
    """Keys of the k best of each row (all where there are fewer); column 0 is point `first`."""
    width = values.shape[1]
    top, column = values.topk(min(k + 1, width), 1)
    keys = keys_of(top[:, :k] + 0.0, column[:, :k] + first)
    if width > k:
        # The next one is as good as the last: which of them were taken is not said.
        tied = (top[:, k] == top[:, k - 1]).nonzero().squeeze(1)
        if len(tied):
            place = torch.arange(first, first + width, device=values.device)
            keys[tied] = keys_of(values[tied] + 0.0, place).topk(k, 1).values
    return keys
