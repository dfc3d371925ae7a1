"""`wanda_mask` by the definition: a stable sort in float64."""

from __future__ import annotations

import torch


@torch.no_grad()
def reference(
    weight: torch.Tensor,
    norm: torch.Tensor,
    count: int,
    pattern: tuple[int, int] | None,
    packed: bool,
) -> tuple[torch.Tensor, bool]:
    """(mask or its bits, whether all scores are finite)."""
    from .wanda_torch import pack

    score = weight.double().abs() * norm.double()
    finite = bool(torch.isfinite(score).all())
    if pattern is None:
        mask = _first(score, count)
    else:
        n, m = pattern
        mask = _first(score.reshape(-1, m), n).reshape(score.shape)
    return (pack(mask) if packed else mask), finite


def _first(score: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` highest of each row, the leftmost of equals."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)
