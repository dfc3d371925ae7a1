"""How far a matrix's outputs move, from its inputs' gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 512


def output_error(made: Tensor, weight: Tensor, gram: Tensor) -> float:
    """||X made' - X weight'||_F / ||X weight'||_F over the tokens of gram = sum of x x'.

    `made` and `weight` (out, in), `gram` (in, in). 0 where both are 0, infinite where the matrix
    gave nothing but zeros and no longer does. Lower is nearer.
    """
    change = output_energy(made.float() - weight.float(), gram)
    if change <= 0.0:
        return 0.0
    before = output_energy(weight.float(), gram)
    return math.sqrt(change / before) if before > 0.0 else math.inf


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """||X weight'||_F^2 = tr(weight gram weight'); products in float32, their sum in float64.

    The gram matrix is symmetric: blocks above its diagonal count twice, those below are left out.
    """
    total = 0.0
    inputs = weight.shape[1]
    gram = gram.to(weight.dtype)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        moved = weight[:, start:stop] @ gram[start:stop, start:]
        inner = (moved * weight[:, start:]).sum(0, dtype=torch.float64)
        total += float(inner[: stop - start].sum() + 2.0 * inner[stop - start :].sum())
    return total
