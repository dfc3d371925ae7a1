"""`pairwise_topk` by the definition, in float64."""

from __future__ import annotations

import torch


@torch.no_grad()
def reference(
    queries: torch.Tensor, points: torch.Tensor, k: int, near: bool, exclude: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices), from all pairs; with `near`, values are negative squared distances."""
    wide, other = queries.double(), points.double()
    if near:
        values = torch.stack([-(other - one).square().sum(1) for one in wide.unbind()] or [wide])
        values = values.reshape(len(wide), len(other))
    else:
        with torch.autocast(queries.device.type, enabled=False):
            values = wide @ other.T
    values = values.float().nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if exclude is not None:
        place = torch.arange(len(points), device=points.device)
        values.masked_fill_(place == exclude[:, None], -torch.inf)
    missing = max(0, k - len(points))
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    best, indices = torch.sort(values + 0.0, dim=1, descending=True, stable=True)
    return best[:, :k].contiguous(), indices[:, :k].contiguous()
