"""One step of k-center: a new centre, a running minimum of distances, and who is furthest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KCenterStep:
    """The row furthest from all centres, on the device of the rows (no waiting for a GPU).

    Attributes
    ----------
    distance
        () float32, its distance; -1 where no row is left.
    index
        () int64, its position, the smallest among equals; -1 where no row is left.
    """

    distance: torch.Tensor
    index: torch.Tensor


def k_center_step(
    points: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    *,
    nearest: torch.Tensor | None = None,
    number: int = 0,
    impl: str = "auto",
) -> KCenterStep:
    """Take one more centre into the running minimum of cosine distances, in place.

    For unit rows, away = 1 - <point, centre>, 0 where that is below 1e-6. Where away is strictly
    below `distance`, it takes its place, and `number` that in `nearest`. A row with a negative
    distance is chosen already: it stays as it is and is not returned, so a caller writes -1
    there. NaN coordinates change nothing.

    Sums are float32 whatever the inputs are (float64 for "reference", then rounded); their error
    is far below 1e-6 for unit rows. One read of `points`, and no copy of them.

    Parameters
    ----------
    points
        (N, d) floating, unit rows.
    centre
        (d,) floating, a unit vector.
    distance
        (N,) float32, contiguous: written to. Start with anything above 2.
    nearest
        (N,) int64, contiguous, or None: written to.
    number
        What `nearest` is told of this centre.
    impl
        "reference": by the definition, in float64. "torch": blocks of rows. "triton": one kernel
        over the rows and a small one over their best, no atomics. "auto": Triton on CUDA, torch
        elsewhere.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, points)
    _check(points, centre, distance, nearest)
    if chosen == "triton":
        from .centers_triton import two_kernels as run
    elif chosen == "torch":
        from .centers_torch import blocked as run
    else:
        from .centers_reference import reference as run
    best, index = run(points, centre, distance, nearest, number)
    left = best >= 0.0
    return KCenterStep(best.where(left, -1.0), index.where(left, -1))


def _check(
    points: torch.Tensor,
    centre: torch.Tensor,
    distance: torch.Tensor,
    nearest: torch.Tensor | None,
) -> None:
    import torch

    check(
        points.dim() == 2 and centre.shape == points.shape[1:],
        f"points are (N, d) and centre (d,); found {tuple(points.shape)} and {tuple(centre.shape)}",
    )
    for name, tensor in (("points", points), ("centre", centre)):
        check(tensor.is_floating_point(), f"{name} is of a floating dtype; found {tensor.dtype}")
    check(centre.device == points.device, f"centre is on {points.device}; found {centre.device}")
    for name, made, dtype in (
        ("distance", distance, torch.float32),
        ("nearest", nearest, torch.int64),
    ):
        if made is None:
            continue
        check(
            made.shape == points.shape[:1]
            and made.dtype == dtype
            and made.device == points.device
            and made.is_contiguous(),
            f"{name} is ({len(points)},) {dtype}, contiguous, on {points.device};"
            f" found {tuple(made.shape)} {made.dtype}, strides {made.stride()}, on {made.device}",
        )
