"""`k_center_step` by the definition, in float64."""

from __future__ import annotations

import torch

SAME = 1e-6  # what is nearer is a copy: float32 unit vectors miss a cosine of 1 by a few ulps


@torch.no_grad()
def reference(
    points: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    nearest: torch.Tensor | None,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(highest distance, its index); -inf where no row is left."""
    with torch.autocast(points.device.type, enabled=False):
        take_in(1.0 - points.double() @ centre.double(), distance, nearest, number)
    return furthest(distance)


def take_in(
    away: torch.Tensor, distance: torch.Tensor, nearest: torch.Tensor | None, number: int
) -> None:
    """Lower `distance` (n,) to `away` (n,) where that is nearer, and say so in `nearest`."""
    away = away.float()
    away.masked_fill_(away < SAME, 0.0)
    closer = away < distance
    torch.where(closer, away, distance, out=distance)
    if nearest is not None:
        nearest.masked_fill_(closer, number)


def furthest(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(highest distance, the first place of it); -inf where there is no row."""
    if not len(distance):
        return distance.new_full((), -torch.inf), distance.new_zeros((), dtype=torch.int64)
    best, index = distance.max(0)
    return best, index
