"""Low-rank adaptation of linear layers (LoRA, arXiv:2106.09685): train, read, fold in.

Written out rather than taken from `peft`: the frozen weight may be bfloat16 while the factors
stay float32, which on a CPU trains about twice as fast, and inference needs no further package.
The factors are named `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r), float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import ModelError

LORA_A, LORA_B = ".lora_A", ".lora_B"


class LoraLinear(nn.Module):
    """y = W x + b + alpha / r * B A x, with W and b frozen; A random, B zero at the start."""

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        draw = torch.randn(rank, base.in_features, generator=generator)
        # Unit-variance A x for unit-variance x (the paper says Gaussian, without a scale).
        self.lora_A = nn.Parameter(draw / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of `x`."""
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        update = nn.functional.linear(low, (self.lora_B * self.scale).to(x.dtype))
        return self.base(x) + update  # type: ignore[no-any-return]


def target_names(encoder: nn.Module) -> list[str]:
    """Names of the linear layers that get factors: all but those of a pooler, in module order."""
    names = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name.split(".")
    ]
    if not names:
        raise ModelError("LoRA: expected linear layers in the encoder, found none")
    return names


def add_lora(encoder: nn.Module, rank: int, alpha: float, *, seed: int) -> list[str]:
    """Freeze the encoder and put factors around its linear layers, in place; their names."""
    if rank < 1:
        raise ModelError(f"LoRA: expected rank >= 1, found {rank}")
    encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    names = target_names(encoder)
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = encoder.get_submodule(parent)
        base = encoder.get_submodule(name)
        if isinstance(base, nn.Linear):
            setattr(owner, child, LoraLinear(base, rank, alpha, generator=generator))
    return names


def lora_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The factors of every LoraLinear, detached, by the names they are stored under."""
    return {
        f"{name}{key}": getattr(module, key[1:]).detach()
        for name, module in encoder.named_modules()
        if isinstance(module, LoraLinear)
        for key in (LORA_A, LORA_B)
    }


def set_lora(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy stored factors into an encoder that `add_lora` has prepared."""
    own = lora_state(encoder)
    _same_names(set(state), set(own))
    for name, module in encoder.named_modules():
        if isinstance(module, LoraLinear):
            for key, target in ((LORA_A, module.lora_A), (LORA_B, module.lora_B)):
                _copy(target, state[f"{name}{key}"], f"{name}{key}")


def fold_lora(encoder: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> None:
    """Add alpha / rank * B A to the linear weights of a plain encoder, in float32, in place."""
    names = target_names(encoder)
    _same_names(set(state), {name + key for name in names for key in (LORA_A, LORA_B)})
    with torch.no_grad():
        for name in names:
            weight = encoder.get_submodule(name).get_parameter("weight")
            a, b = state[name + LORA_A].float(), state[name + LORA_B].float()
            if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
                raise ModelError(
                    f"LoRA {name}: expected A ({rank}, {weight.shape[1]}) and "
                    f"B ({weight.shape[0]}, {rank}), found {tuple(a.shape)}, {tuple(b.shape)}; "
                    "the adapter belongs to another encoder"
                )
            weight.add_((alpha / rank * (b @ a)).to(weight.dtype))


def _same_names(found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise ModelError(
            f"LoRA: missing factors {sorted(expected - found)[:5]}, unexpected "
            f"{sorted(found - expected)[:5]}; the adapter belongs to another encoder"
        )


def _copy(target: nn.Parameter, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ModelError(
            f"LoRA {name}: expected shape {tuple(target.shape)}, found {tuple(value.shape)}"
        )
    with torch.no_grad():
        target.copy_(value)
