"""How dense each matrix of a randomly sparse network is: ERK."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError
from ..contract import check_fraction


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Share of each tensor's weights to keep, by the Erdos-Renyi kernel (arXiv:1911.11134).

    d_l = min(1, eps * sum(shape) / prod(shape)): a matrix keeps a number of weights in proportion
    to its inputs plus outputs. eps is such that the densities' mean, weighted by size, is
    `density`; tensors that would pass 1 are dense, and eps is solved again from what is left of
    the budget until none passes.

    Parameters
    ----------
    shapes
        Of the tensors; every size at least 1.
    density
        Share of all weights to keep, in [0, 1].

    Raises
    ------
    InputError
        A density outside [0, 1], or a shape with a size under 1 (its place is named).
    """
    check_fraction("density", density)
    sizes, sums = [], []
    for place, shape in enumerate(shapes):
        size = 1
        for length in shape:
            size *= length
        if not len(shape) or min(shape) < 1:
            raise InputError(
                f"`shapes` are of tensors with at least one weight; place {place} holds"
                f" {tuple(shape)}. Leave that tensor out."
            )
        sizes.append(size)
        sums.append(sum(shape))
    budget = density * sum(sizes)
    dense: set[int] = set()
    while len(dense) < len(sizes):
        rest = [place for place in range(len(sizes)) if place not in dense]
        left = budget - sum(sizes[place] for place in dense)
        # prod * (sum / prod): each tensor's share of the budget goes with its sum of sizes.
        eps = left / sum(sums[place] for place in rest)
        over = {place for place in rest if eps * sums[place] > sizes[place]}
        if not over:
            return [
                1.0 if place in dense else max(0.0, eps * sums[place] / sizes[place])
                for place in range(len(sizes))
            ]
        dense |= over
    return [1.0] * len(sizes)
