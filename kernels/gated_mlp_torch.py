"""`sparse_gated_mlp` in torch: the definition, and rows of live neurons gathered a few at a time.

Gathering all live rows at once would write and read them again in main memory; a few hundred
stay in the cache, where their product reads them.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .gated_mlp import MOST_ROWS

BYTES = 1 << 22  # of the rows gathered at a time
# Live neurons from which on all rows are read instead: about where gathering is even with a dense
# MLP at 11,008 x 4,096 (benchmarks/weight_kernels.py). Weights that fit the cache are even sooner.
DENSE_SHARE = {torch.bfloat16: 0.5, torch.float16: 0.5}
DENSE_SHARE_FLOAT = 0.6


def activate(value: torch.Tensor, activation: str) -> torch.Tensor:
    """act(value)."""
    if activation == "silu":
        return functional.silu(value)
    if activation == "relu":
        return functional.relu(value)
    return functional.gelu(value, approximate="tanh" if activation == "gelu_tanh" else "none")


@torch.no_grad()
def reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    limit: torch.Tensor,
    activation: str,
    product: bool,
) -> torch.Tensor:
    """(B, d_out), in float64 until the last rounding."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.double()
        acted = activate(wide @ gate.double().T, activation)
        inner = acted * (wide @ up.double().T)
        dead = (inner if product else acted).abs() <= limit.double()
        return (inner.masked_fill(dead, 0.0) @ down_t.double()).to(x.dtype)


@torch.no_grad()
def gathered(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    limit: torch.Tensor,
    activation: str,
    product: bool,
) -> torch.Tensor:
    """(B, d_out)."""
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.promote_types(x.dtype, torch.float32)
        acted = activate(functional.linear(x, gate).to(kind), activation)
        if product:
            acted = acted * functional.linear(x, up).to(kind)
        dead = acted.abs() <= limit
        acted = acted.masked_fill_(dead, 0.0)
        few = len(x) <= MOST_ROWS and not x.is_cuda
        live = (~dead).any(0).nonzero().squeeze(1) if few else None
        if live is None or len(live) > _dense_share(x.dtype) * len(gate):
            if not product:
                acted = torch.where(dead, 0.0, acted * functional.linear(x, up).to(kind))
            return acted.to(x.dtype) @ down_t
        return _over(live, x, acted, None if product else up, down_t)


def _dense_share(dtype: torch.dtype) -> float:
    return DENSE_SHARE.get(dtype, DENSE_SHARE_FLOAT)


def _over(
    live: torch.Tensor,
    x: torch.Tensor,
    acted: torch.Tensor,
    up: torch.Tensor | None,
    down_t: torch.Tensor,
) -> torch.Tensor:
    """The rest for the neurons `live` (k,); with `up` None, `acted` (B, n) is h already."""
    dead = acted == 0.0
    out = torch.zeros((len(x), down_t.shape[1]), dtype=acted.dtype, device=x.device)
    widest = max(1, x.shape[1], down_t.shape[1]) * x.element_size()
    step = max(1, BYTES // widest)
    for some in torch.split(live, step):
        inner = acted[:, some]
        if up is not None:
            inner = inner * functional.linear(x, up.index_select(0, some)).to(inner.dtype)
            inner = inner.masked_fill_(dead[:, some], 0.0)
        out += inner.to(x.dtype) @ down_t.index_select(0, some)
    return out.to(x.dtype)
