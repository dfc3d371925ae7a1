"""`hadamard` in torch: the definition, and two products with small factors.

H_ab = H_a ⊗ H_b, so a block of a * b coordinates, seen as an (a, b) matrix X, becomes H_a X H_b:
2 (a + b) operations a coordinate where the matrix needs 2 a b and a butterfly, in torch, reads
and writes everything log2(a b) times.
"""

from __future__ import annotations

import math

import torch

CELLS = 1 << 20  # of a block of rows: 4 MiB of float32
GPU_CELLS = 1 << 26


def sylvester(rows: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, rows) of +1 and -1 in the dtype and on the device of `like`; rows a power of two."""
    made = torch.ones((1, 1), dtype=like.dtype, device=like.device)
    while len(made) < rows:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def matrix(
    size: int,
    block: int,
    signs: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """(size, size) diag(signs) (I ⊗ H) / sqrt(block), rounded from float64."""
    like = torch.empty(0, dtype=torch.float64, device=device)
    core = sylvester(block, like) / math.sqrt(block)
    made = torch.kron(torch.eye(size // block, dtype=like.dtype, device=like.device), core)
    if signs is not None:
        made *= signs.to(like.device, like.dtype)[:, None]
    return made.to(dtype or torch.float32)


@torch.no_grad()
def reference(
    x: torch.Tensor, block: int, signs: torch.Tensor | None, inverse: bool
) -> torch.Tensor:
    """(N, d) rotated, by the whole matrix in float64."""
    rotation = matrix(x.shape[1], block, signs, torch.float64, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return (x.double() @ (rotation.T if inverse else rotation)).to(x.dtype)


@torch.no_grad()
def two_factors(
    x: torch.Tensor, block: int, signs: torch.Tensor | None, inverse: bool
) -> torch.Tensor:
    """(N, d) rotated."""
    rows, size = x.shape
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=kind, device=x.device)
    right = 1 << (block.bit_length() // 2)
    left = block // right
    outer, inner = sylvester(left, like), sylvester(right, like) / math.sqrt(block)
    turn = None if signs is None else signs.to(kind)
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    step = max(1, (GPU_CELLS if x.is_cuda else CELLS) // size)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, rows, step):
            part = x[start : start + step].to(kind)
            if turn is not None and not inverse:
                part = part * turn
            half = (part.reshape(-1, right) @ inner).view(-1, left, right)
            made = (outer @ half).view(-1, size)
            if turn is not None and inverse:
                made = made * turn
            out[start : start + step] = made
    return out
