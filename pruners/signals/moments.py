"""Count, mean and sum of squared deviations of many vectors, in one pass and in mergeable parts.

Two parts are joined by the formula of Chan, Golub and LeVeque (1979), of which Welford's update
is the case of one vector. A variance taken as E[x²] - E[x]² loses its digits where the mean is
large, and one updated with a mean that has already moved (as in FLAP's code) is another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Vectors looked at together on a CPU, so that their float64 copies stay in the cache.
_CPU_ROWS = 256


@dataclass(slots=True)
class Moments:
    """Of vectors of `size` numbers.

    Attributes
    ----------
    count
        How many vectors were seen.
    mean, m2
        (size,) float64: their mean, and the sum of squared deviations from it. The variance is
        m2 / count, or m2 / (count - 1) of a sample.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> Moments:
        """Of no vector: zeros."""
        zeros = torch.zeros(size, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def update(self, rows: Tensor) -> None:
        """Take in rows (T, size), floating; T may be 0."""
        step = _CPU_ROWS if rows.device.type == "cpu" else max(len(rows), 1)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double()
            mean = part.mean(0)
            m2 = (part - mean).square_().sum(0)
            self.count, self.mean, self.m2 = joined(
                self.count, self.mean, self.m2, len(part), mean, m2
            )


def joined(
    count: int, mean: Tensor, m2: Tensor, more: int, more_mean: Tensor, more_m2: Tensor
) -> tuple[int, Tensor, Tensor]:
    """Count, mean (size,) and m2 (size,) of two parts together, in float64."""
    total = count + more
    if total == 0:
        return 0, mean, m2
    delta = more_mean - mean
    return (
        total,
        mean + delta * (more / total),
        m2 + more_m2 + delta.square() * (count * more / total),
    )
