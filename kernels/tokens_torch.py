"""`token_stats` in torch: rows and vocabulary in tiles that stay in the cache.

A tile of logits is made, reduced to three numbers a row (maximum, sum of exp, sum of exp times
shifted logit) and written over by the next, so that memory is a tile's and the passes over it
read the cache. On a processor that is faster than full logits, not only smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Rows and float32 cells of a tile. On a CPU 4 MiB stays in the second-level cache, and more rows
# read the weights less often. On a GPU fewer launches matter more.
CPU_TILE = (512, 1 << 20)
GPU_TILE = (1024, 1 << 24)
RANK_CELLS = 1 << 24  # of the rows whose logits are all held at once for the rank: 64 MiB
UPCAST_CELLS = 1 << 22  # of a slice of low-precision weights as float32: 16 MiB
NEVER = -1e4  # exp gives 0 in float32, and 0 * NEVER is 0 where 0 * -inf is NaN


@dataclass(frozen=True)
class _Head:
    """The head, and the float32 memory that its tiles are made in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float
    width: int  # vocabulary entries of a tile
    scratch: torch.Tensor  # (2, rows * width): a tile's logits and their exp
    upcast: torch.Tensor | None  # (width, d) where the weights are not float32

    def spans(self) -> Iterator[slice]:
        """Tiles of the vocabulary."""
        for start in range(0, len(self.weight), self.width):
            yield slice(start, min(start + self.width, len(self.weight)))

    def logits(self, states: torch.Tensor, span: slice, out: torch.Tensor) -> torch.Tensor:
        """Logits of `states` (n, d) for the entries in `span`, written to `out`."""
        weight = self.weight[span]
        if self.upcast is not None:
            weight = self.upcast[: len(weight)].copy_(weight)
        torch.mm(states, weight.T, out=out)
        if self.bias is not None:
            out.add_(self.bias[span])
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out


class _Sums:
    """Online maximum, sum of exp and sum of exp times logit, both less the maximum; (n, 1)."""

    def __init__(self, states: torch.Tensor) -> None:
        shape = (len(states), 1)
        self.maximum = states.new_full(shape, -torch.inf)
        self.exp = states.new_zeros(shape)
        self.exp_logit = states.new_zeros(shape)

    def add(self, logits: torch.Tensor, scratch: torch.Tensor) -> None:
        """Take in a tile of logits, which is spent."""
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        # Where all are -inf so far, any finite shift will do; their exp is 0.
        shift = torch.where(maximum == -torch.inf, 0.0, maximum)
        logits.sub_(shift).clamp_(min=NEVER)
        exp = torch.exp(logits, out=scratch)
        down = (self.maximum - shift).clamp_(min=NEVER)
        factor = down.exp()
        products = torch.linalg.vecdot(exp, logits).unsqueeze(1)
        self.exp_logit = (self.exp_logit + self.exp * down) * factor + products
        self.exp = self.exp * factor + exp.sum(1, keepdim=True)
        self.maximum = maximum


@torch.no_grad()
def tiled(
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
    most, cells = GPU_TILE if hidden.is_cuda else CPU_TILE
    if rank:
        most = min(most, max(1, RANK_CELLS // vocabulary))
    most = max(1, min(most, count))
    width = min(vocabulary, max(1, cells // most))
    low = weight.dtype != torch.float32
    if low:
        width = min(width, max(1, UPCAST_CELLS // max(1, size)))
    head = _Head(
        weight,
        bias,
        softcap,
        scale,
        width,
        hidden.new_empty((2, most * width), dtype=torch.float32),
        hidden.new_empty((width, size), dtype=torch.float32) if low else None,
    )
    whole = hidden.new_empty((most, vocabulary), dtype=torch.float32) if rank else None
    out = hidden.new_empty((3, count), dtype=torch.float32)
    above = torch.zeros(count, dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            states = hidden[rows[part]].float()
            if whole is None:
                sums, at_target = _one_pass(head, states, targets[part])
            else:
                kept = whole[: len(states)]
                sums, at_target, above[part] = _two_passes(head, states, targets[part], kept)
            log_sum = sums.exp.log()
            lse = sums.maximum + log_sum
            out[0, part] = (lse - at_target).squeeze(1)
            out[1, part] = (log_sum - sums.exp_logit / sums.exp).squeeze(1)
            out[2, part] = lse.squeeze(1)
    return out[0], out[1], out[2], above


def _one_pass(
    head: _Head, states: torch.Tensor, targets: torch.Tensor
) -> tuple[_Sums, torch.Tensor]:
    """Sums, and the targets' logits (n, 1), forgetting each tile after its use."""
    sums = _Sums(states)
    at_target = sums.exp
    for span in head.spans():
        wide = span.stop - span.start
        tile, scratch = head.scratch[:, : len(states) * wide].view(2, len(states), wide)
        logits = head.logits(states, span, tile)
        place = targets[:, None] - span.start
        inside = (place >= 0) & (place < wide)
        at_target = torch.where(inside, logits.gather(1, place.clamp(0, wide - 1)), at_target)
        sums.add(logits, scratch)
    return sums, at_target


def _two_passes(
    head: _Head, states: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor
) -> tuple[_Sums, torch.Tensor, torch.Tensor]:
    """The same and the rank, from logits that are `kept` (n, V) until the target's is known."""
    for span in head.spans():
        head.logits(states, span, kept[:, span])
    at_target = kept.gather(1, targets[:, None])
    sums = _Sums(states)
    above = torch.zeros_like(targets)
    for span in head.spans():
        logits = kept[:, span]
        above += (logits > at_target).sum(1)
        wide = span.stop - span.start
        sums.add(logits, head.scratch[1, : len(states) * wide].view(len(states), wide))
    return sums, at_target, above
