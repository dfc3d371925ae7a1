"""The k points of the highest product with each query, or the nearest to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch

MOST_POINTS = 2**31 - 1  # a place is half of a 64-bit key


def pairwise_topk(
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int,
    *,
    metric: Literal["ip", "l2"] = "ip",
    exclude: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact k best points of each query, best first, never holding queries x points.

    "ip": inner product, the highest first (cosine, for unit rows). "l2": squared Euclidean
    distance, the smallest first, from |q|**2 + |p|**2 - 2 <q, p>, and not below 0. Equal values go
    by smaller index; values are equal as they are computed, so rounding may part two that are
    equal on paper. Products and sums are float32 whatever the inputs are (float64 for
    "reference", then rounded): on a GPU "torch" follows torch's setting for float32 products,
    and "triton" takes three TF32 products for one, with about a float32 product's error. No
    gradient is kept.

    Parameters
    ----------
    queries
        (Q, d) floating.
    points
        (N, d) floating, N below 2**31.
    k
        Neighbours of each query, at least 1; several hundred are fine.
    metric
        "ip" or "l2".
    exclude
        (Q,) int64, a point that each query may not have, its own copy say; -1 = none.
    impl
        "reference": by the definition, in float64, all pairs at once. "torch": blocks of 16 MiB
        of values on a CPU, 64 MiB on a GPU. "triton": one kernel a block makes sortable 64-bit
        keys of value and index, 64 MiB of them, no atomics. "auto": Triton on CUDA, torch
        elsewhere. Beside a block, memory is 24 bytes a neighbour.

    Returns
    -------
    values
        (Q, k) float32, products or squared distances, best first.
    indices
        (Q, k) int64. Where fewer than k points can be had, the last values are -inf ("l2": inf)
        and the last indices -1. So it is with points whose value is NaN or infinitely bad: they
        are never chosen.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, an unknown metric, k below 1.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, queries)
    _check(queries, points, k, metric, exclude)
    if chosen == "triton":
        from .nearest_triton import keyed as run
    elif chosen == "torch":
        from .nearest_torch import blocked as run
    else:
        from .nearest_reference import reference as run
    near = metric == "l2"
    values, indices = run(queries, points, k, near, exclude)
    indices.masked_fill_(values.isneginf(), -1)
    # Not a negation: 0.0 must not become -0.0.
    return 0.0 - values if near else values, indices


def _check(
    queries: torch.Tensor,
    points: torch.Tensor,
    k: int,
    metric: str,
    exclude: torch.Tensor | None,
) -> None:
    import torch

    check(
        queries.dim() == 2 and points.dim() == 2 and queries.shape[1] == points.shape[1],
        "queries are (Q, d) and points (N, d);"
        f" found {tuple(queries.shape)} and {tuple(points.shape)}",
    )
    for name, tensor in (("queries", queries), ("points", points)):
        check(tensor.is_floating_point(), f"{name} is of a floating dtype; found {tensor.dtype}")
    check(
        queries.device == points.device,
        f"queries and points are on one device; found {queries.device} and {points.device}",
    )
    check(len(points) <= MOST_POINTS, f"points are at most {MOST_POINTS}; found {len(points)}")
    check(k >= 1, f"k is at least 1; found {k}")
    check(metric in ("ip", "l2"), f"metric is 'ip' or 'l2'; found {metric!r}")
    if exclude is not None:
        check(
            exclude.shape == queries.shape[:1]
            and exclude.dtype == torch.int64
            and exclude.device == queries.device,
            f"exclude is ({len(queries)},) int64 on {queries.device};"
            f" found {tuple(exclude.shape)} {exclude.dtype} on {exclude.device}",
        )
