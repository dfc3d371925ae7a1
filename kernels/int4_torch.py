"""4-bit weights in torch: packing, the definition, and a product over a few rows at a time."""

from __future__ import annotations

import torch
from torch.nn import functional

WORD = 8
CPU_CELLS = 1 << 19  # of the weights made at a time
GPU_CELLS = 1 << 26


def pack(values: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 in [-8, 7] to (out, ceil(in / 8)) int32."""
    rows, size = values.shape
    nibbles = functional.pad(values.to(torch.int32) + 8, (0, -size % WORD))
    apart = nibbles.view(rows, -(-size // WORD), WORD)
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    # Nibbles do not overlap, so the sum is their union; the highest may turn the sign.
    return (apart << shift).sum(2, dtype=torch.int32)


def unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """(out, size) int8 in [-8, 7]."""
    rows, words = packed.shape
    made = torch.empty((rows, 4 * words, 2), dtype=torch.int8, device=packed.device)
    pairs = packed.contiguous().view(torch.int8)  # little-endian: the first two nibbles first
    torch.bitwise_and(pairs, 15, out=made[:, :, 0])
    torch.bitwise_and(pairs >> 4, 15, out=made[:, :, 1])
    return made.view(rows, WORD * words)[:, :size].sub_(8)


def weights(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(out, size) weights in `dtype`."""
    rows, groups = scale.shape
    group_size = min(group_size, size)
    values = functional.pad(unpack(packed, size), (0, groups * group_size - size))
    made = values.view(rows, groups, group_size).to(dtype)
    if zero is not None:
        made = made - zero[:, :, None].to(dtype)
    return (made * scale[:, :, None].to(dtype)).view(rows, groups * group_size)[:, :size]


@torch.no_grad()
def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """(B, out), in float64 until the last rounding."""
    with torch.autocast(x.device.type, enabled=False):
        weight = weights(packed, scale, zero, group_size, x.shape[1], torch.float64)
        return (x.double() @ weight.T).to(x.dtype)


@torch.no_grad()
def blocked(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """(B, out)."""
    size = x.shape[1]
    out = torch.empty((len(x), len(packed)), dtype=x.dtype, device=x.device)
    kind = torch.promote_types(torch.float32, x.dtype)
    step = max(1, (GPU_CELLS if x.is_cuda else CPU_CELLS) // max(1, size))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(packed), step):
            part = slice(start, start + step)
            own = None if zero is None else zero[part]
            weight = weights(packed[part], scale[part], own, group_size, size, kind)
            out[:, part] = functional.linear(x, weight.to(x.dtype))
    return out
