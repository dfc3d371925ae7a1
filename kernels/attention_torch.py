"""`attention_mass` in torch: a block of queries against the keys that they may see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from .attention_reference import Sight

CPU_BLOCK = (128, 1 << 22)  # queries, and float32 cells: 16 MiB
GPU_BLOCK = (4096, 1 << 24)  # 64 MiB


@torch.no_grad()
def blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    query_rows: torch.Tensor | None,
    key_columns: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sight: Sight,
    columns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(row, column); only the chosen queries are computed."""
    batch, heads, queries, _ = query.shape
    shared = heads // key.shape[1]
    row = query.new_zeros((batch, heads, queries), dtype=torch.float32)
    column = query.new_zeros((batch, heads if columns else 0, sight.keys), dtype=torch.float32)
    every = torch.arange(queries, device=query.device)
    limits = GPU_BLOCK if query.is_cuda else CPU_BLOCK
    with torch.autocast(query.device.type, enabled=False):
        for item in range(batch):
            rows = every if query_rows is None else query_rows[item].nonzero().squeeze(1)
            chosen = None if key_columns is None else key_columns[item].float()
            for part, span in _blocks(sight, item, rows, shared, limits):
                hidden = ~sight.mask(item, part, span)
                for group in range(key.shape[1]):
                    own = slice(group * shared, (group + 1) * shared)
                    exp = _logits(query[item, own, part], key[item, group, span], scale, softcap)
                    exp.masked_fill_(hidden, -torch.inf)
                    top = exp.amax(2, keepdim=True)
                    # A query that sees no key here sees none at all: any finite shift will do.
                    exp.sub_(top.masked_fill_(top == -torch.inf, 0.0)).exp_()
                    total = exp.sum(2)
                    inverse = torch.where(total == 0.0, 0.0, 1.0 / total)
                    mass = total if chosen is None else exp @ chosen[span]
                    row[item, own, part] = mass * inverse
                    if columns:
                        column[item, own, span] += (inverse[:, None] @ exp).squeeze(1)
    return row, column if columns else None


def _blocks(
    sight: Sight, item: int, rows: torch.Tensor, shared: int, limits: tuple[int, int]
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Query `rows` (ascending) in blocks of near positions, and the keys that each may see."""
    most, cells = limits
    width = sight.keys
    if sight.causal and sight.window is not None:
        width = min(width, sight.window + most)
    step = max(1, min(most, cells // max(1, shared * width)))
    borders = torch.arange(0, sight.queries + step, step, device=rows.device)
    ends = torch.searchsorted(rows, borders).tolist()
    for first, (start, stop) in enumerate(pairwise(ends)):
        if start == stop:
            continue
        part = rows[start:stop]
        earliest = sight.ahead + first * step
        low, high = 0, sight.keys
        if sight.causal:
            high = min(high, max(0, earliest + step))
        if sight.window is not None:
            low = max(0, earliest - sight.window + 1)
        if sight.query_segment is not None and sight.key_segment is not None and low < high:
            same = torch.isin(sight.key_segment[item, low:high], sight.query_segment[item, part])
            found = same.nonzero().squeeze(1)
            high = low + int(found[-1]) + 1 if len(found) else low
            low = low + int(found[0]) if len(found) else low
        if low < high:
            yield part, slice(low, high)


def _logits(
    query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """(heads, n, k) float32 of queries (heads, n, D) and the keys (k, D) that they share."""
    heads, count, size = query.shape
    flat = query.float().reshape(heads * count, size)
    logits = (flat @ key.float().T).view(heads, count, len(key)).mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits
