"""`k_center_step` in torch: blocks of rows, so that what is made of them stays in the cache."""

from __future__ import annotations

import torch

from .centers_reference import furthest, take_in

CPU_CELLS = 1 << 22  # 16 MiB of float32
GPU_CELLS = 1 << 26


@torch.no_grad()
def blocked(
    points: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    nearest: torch.Tensor | None,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(highest distance, its index); -inf where no row is left."""
    wanted = centre.float()
    cells = GPU_CELLS if points.is_cuda else CPU_CELLS
    rows = max(1, cells // max(1, points.shape[1]))
    with torch.autocast(points.device.type, enabled=False):
        for start in range(0, len(points), rows):
            part = slice(start, start + rows)
            away = 1.0 - points[part].float() @ wanted
            own = None if nearest is None else nearest[part]
            take_in(away, distance[part], own, number)
    return furthest(distance)
