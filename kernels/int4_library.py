"""torch's own 4-bit products behind one name: bfloat16, on a CPU and on CUDA."""

from __future__ import annotations

import torch

from .int4 import Int4Library
from .int4_torch import blocked, unpack

GROUPS = (32, 64, 128, 256)
# Rows of x up to which the kernel beats a dense bfloat16 product: measured on a CPU with AVX-512
# by benchmarks/weight_kernels.py (4,096 x 4,096: 3 times as fast for 1 row, about even at 8,
# half as fast for 64). In float16 and float32 it is slower than the dense one from the first.
MOST_ROWS = 8
INNER_TILES = 8


def prepare(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    size: int,
) -> Int4Library | None:
    """The weight as torch's kernel wants it, or None where it takes no such."""
    step = 16 * INNER_TILES if packed.is_cuda else group_size
    if group_size not in GROUPS or size % group_size or size % step or len(packed) % 16:
        return None
    name = "_convert_weight_to_int4pack" + ("" if packed.is_cuda else "_for_cpu")
    convert = getattr(torch.ops.aten, name, None)
    if convert is None or packed.device.type not in ("cpu", "cuda"):
        return None
    values = unpack(packed, size) + 8
    if packed.is_cuda:
        given = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
    else:
        given = values.to(torch.int32)
    step_up = scale.float()
    shift = torch.zeros_like(step_up) if zero is None else -zero.float() * step_up
    both = torch.stack([step_up, shift], 2).transpose(0, 1).contiguous().bfloat16()
    try:
        made = Int4Library(convert(given, INNER_TILES), both, group_size)
        return made if _agrees(made, packed, scale, zero, size) else None
    except RuntimeError:  # another version's limits: the portable path remains
        return None


def _agrees(
    made: Int4Library,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    size: int,
) -> bool:
    """Whether one product is ours but for bfloat16's rounding."""
    x = torch.cos(torch.arange(size, device=packed.device, dtype=torch.float32))[None].bfloat16()
    mine = blocked(x.float(), packed, scale, zero, made.group_size)
    return bool((product(x, made).float() - mine).abs().max() <= 0.05 * mine.abs().max() + 1e-6)


def fits(x: torch.Tensor, prepared: Int4Library, outputs: int) -> bool:
    """Whether the kernel takes x, and is the faster one."""
    same = prepared.scale_and_zero
    return (
        x.dtype == torch.bfloat16
        and 0 < len(x) <= MOST_ROWS
        and same.device == x.device
        and same.shape[:2] == (x.shape[1] // prepared.group_size, outputs)
    )


@torch.no_grad()
def product(x: torch.Tensor, prepared: Int4Library) -> torch.Tensor:
    """(B, out) bfloat16."""
    ops = torch.ops.aten
    run = ops._weight_int4pack_mm if x.is_cuda else ops._weight_int4pack_mm_for_cpu
    made: torch.Tensor = run(
        x.contiguous(), prepared.weight, prepared.group_size, prepared.scale_and_zero
    )
    return made
