"""Low-rank updates of weight matrices that can leave zeros at zero, and are folded in afterwards.

LoRA (arXiv:2106.09685) adds s B A to a frozen weight W, with s = alpha / rank. MaskLoRA (PERP,
arXiv:2312.15230) adds s (B A) ⊙ 1[W ≠ 0], so that the update can be folded into a pruned weight
without filling its zeros.

Unlike `pruners/models/lora.py`, which trains encoders, these also hold for weights stored
(in, out), as GPT-2's are, and for masked weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...errors import ModelError


class LowRank(nn.Module):
    """y = x (W + U)ᵀ + b with W and b of `base`, and U of rank `rank` at most.

    Parameters
    ----------
    base
        A linear layer, or GPT-2's Conv1D; its weight is frozen.
    rank, alpha
        Of the update; a rank beyond the sides of the matrix is cut to the smaller one.
    masked
        U = s (B A) ⊙ 1[W ≠ 0]; else U = s B A.
    transposed
        The weight is stored (in, out).
    generator
        On the CPU; draws A from a normal of variance 1 / in (the paper says Gaussian without a
        scale; this gives A x the variance of x). B starts at zero, so U does.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        masked: bool,
        transposed: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ModelError(f"low-rank update: expected a rank of at least 1, found {rank}.")
        self.base, self.masked, self.transposed = base, masked, transposed
        weight = base.get_parameter("weight").requires_grad_(False)
        ins, outs = weight.shape if transposed else reversed(weight.shape)
        rank = min(rank, int(ins), int(outs))
        self.scale = alpha / rank
        drawn = torch.randn(rank, int(ins), generator=generator) / math.sqrt(int(ins))
        self.lora_A = nn.Parameter(drawn.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(int(outs), rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.masked:
            low = nn.functional.linear(x, self.lora_A)
            made: Tensor = self.base(x)
            return made + nn.functional.linear(low, self.lora_B * self.scale)
        bias = self.base._parameters.get("bias")
        weight = self.merged()
        return nn.functional.linear(x, weight.T if self.transposed else weight, bias)

    def merged(self) -> Tensor:
        """W + U, float32 in the shape of the stored weight; gradients flow to the factors."""
        weight = self.base.get_parameter("weight")
        update = (self.lora_B * self.scale) @ self.lora_A
        if self.transposed:
            update = update.T
        if self.masked:
            update = update * (weight != 0)
        return weight + update


def add_low_rank(
    block: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    keep_zeros: bool,
    transposed: bool,
    generator: torch.Generator,
) -> list[str]:
    """Put `LowRank` around modules of a block, in place; their names.

    With `keep_zeros` the update of a matrix that has zeros is masked.
    """
    made = []
    for name in names:
        base = block.get_submodule(name)
        zeros = keep_zeros and bool((base.get_parameter("weight") == 0).any())
        wrapped = LowRank(
            base,
            rank=rank,
            alpha=alpha,
            masked=zeros,
            transposed=transposed,
            generator=generator,
        )
        _replace(block, name, wrapped)
        made.append(name)
    return made


def fold_low_rank(block: nn.Module) -> list[str]:
    """Add every update to its weight and take the factors away, in place; the modules' names."""
    wrapped = {name: part for name, part in block.named_modules() if isinstance(part, LowRank)}
    for name, part in wrapped.items():
        with torch.no_grad():
            part.base.get_parameter("weight").copy_(part.merged())
        _replace(block, name, part.base)
    return list(wrapped)


def drop_low_rank(block: nn.Module) -> None:
    """Take the factors away and leave the weights as they were, in place."""
    for name, part in list(block.named_modules()):
        if isinstance(part, LowRank):
            _replace(block, name, part.base)


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
