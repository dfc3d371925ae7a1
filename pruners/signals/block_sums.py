"""Running sums over what enters a matrix and over what experts give, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.wanda import column_square_sums
from ..models.block_layouts import SplitExperts
from .moments import Moments

EXPERT_STATISTICS = frozenset(
    {"expert_tokens", "expert_gate", "expert_norm", "expert_reap", "expert_easy"}
)


_BLOCK = 256


class InputSums:
    """Sums over what enters one matrix."""

    def __init__(self, size: int, wanted: frozenset[str], device: torch.device) -> None:
        self.wanted, self.tokens = wanted, 0
        self.moments = Moments.empty(size, device) if wanted & {"mean", "m2"} else None
        self.sums: dict[str, Tensor] = {}
        if "sum_squares" in wanted:
            self.sums["sum_squares"] = torch.zeros(size, dtype=torch.float64, device=device)
        for name in ("gram", "weighted_gram"):
            if name in wanted:
                self.sums[name] = torch.zeros(size, size, dtype=torch.float32, device=device)

    def update(self, rows: Tensor) -> None:
        """Take in (T, in), none of it padding."""
        self.tokens += len(rows)
        if not len(rows):
            return
        if self.moments is not None:
            self.moments.update(rows)
        if "sum_squares" in self.sums:
            self.sums["sum_squares"] += _square_sums(rows)
        if "gram" in self.sums:
            wide = rows.float()
            _add_products(self.sums["gram"], wide, wide)

    def update_weighted(self, rows: Tensor, weight: Tensor) -> None:
        """Take in (T, in) with weights (T,)."""
        wide = rows.float()
        _add_products(self.sums["weighted_gram"], wide, wide * weight.float()[:, None])

    def result(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        made = {"count": torch.tensor(self.tokens)}
        for name in self.sums.keys() & {"gram", "weighted_gram"}:
            _mirror(self.sums[name])
        made |= {name: array.cpu() for name, array in self.sums.items()}
        if self.moments is not None:
            made["mean"] = self.moments.mean.cpu()
            if "m2" in self.wanted:
                made["m2"] = self.moments.m2.cpu()
        return made


class ExpertSums:
    """Sums over the tokens that each expert gets."""

    def __init__(self, experts: SplitExperts, wanted: frozenset[str]) -> None:
        device = next(experts.parameters()).device
        self.sums = {
            name: torch.zeros(
                experts.count,
                dtype=torch.int64 if name == "expert_tokens" else torch.float64,
                device=device,
            )
            for name in sorted(wanted & EXPERT_STATISTICS)
        }
        self._residual: Tensor | None = None
        self._routing: tuple[Tensor, Tensor] | None = None
        self._norms: dict[int, Tensor] = {}

    def before(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """The residual stream, as it enters the norm before the experts."""
        self._residual = given[0].detach().reshape(-1, given[0].shape[-1])

    def routed(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Which experts each token goes to, with which weight."""
        self._routing = (given[1], given[2])
        self._norms = {}

    def output(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """A hook for what an expert makes, before the router's weight."""

        def hook(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            self._norms[number] = out.detach().double().norm(dim=-1)

        return hook

    def done(self, out: Tensor, valid: Tensor) -> None:
        """All experts have run: add up their tokens. `out` (T, d), `valid` (B, T)."""
        assert self._residual is not None
        assert self._routing is not None
        index, weight = self._routing
        contribution = torch.zeros(valid.numel(), dtype=torch.float64, device=out.device)
        if "expert_easy" in self.sums:
            after = self._residual.double() + out.detach().double()
            contribution = (1.0 - cosine_rows(self._residual, after)).clamp(min=0)
        for number, norm in self._norms.items():
            token, place = torch.where(index == number)
            real = valid.flatten()[token]
            gate = weight[token, place].double()[real]
            norm, token = norm[real], token[real]
            found = {
                "expert_tokens": real.sum(),
                "expert_gate": gate.sum(),
                "expert_norm": norm.sum(),
                "expert_reap": (gate * norm).sum(),
                "expert_easy": (gate * norm * contribution[token]).sum(),
            }
            for name, sums in self.sums.items():
                sums[number] += found[name]
        self._residual = self._routing = None


def cosine_rows(one: Tensor, other: Tensor) -> Tensor:
    """(T,) float64 cosine of rows (T, d); 0 where one is all zero."""
    mine, theirs = one.detach().double(), other.detach().double()
    size = mine.norm(dim=-1) * theirs.norm(dim=-1)
    made: Tensor = (mine * theirs).sum(-1) / size.clamp(min=torch.finfo(torch.float64).tiny)
    return made


def _square_sums(rows: Tensor) -> Tensor:
    """(in,) float64 sum of squares of the columns of (T, in), squared and summed in float32."""
    made = torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device)
    column_square_sums(rows, made)
    return made.double()


def _add_products(into: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one' other of (T, in) to (in, in): what lies on and above the diagonal, by blocks.

    It is symmetric, so that the rest need not be computed; see `_mirror`.
    """
    size = len(into)
    step = size if into.is_cuda else _BLOCK
    for start in range(0, size, step):
        stop = min(start + step, size)
        into[start:stop, start:].addmm_(one[:, start:stop].T, other[:, start:])


def _mirror(sums: Tensor) -> None:
    """Make (in, in) symmetric, by what lies above its diagonal."""
    for start in range(0, len(sums), _BLOCK):
        stop = min(start + _BLOCK, len(sums))
        block = sums[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        sums[stop:, start:stop] = sums[start:stop, stop:].T


def position_sums(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of arrays of several lengths, each starting at position 0."""
    made = torch.zeros(max((len(part) for part in parts), default=0), dtype=dtype)
    for part in parts:
        made[: len(part)] += part.to(dtype)
    return made
