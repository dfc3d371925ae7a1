"""Grids of whole numbers for weights, and rounding to the nearest.

A weight is (code - zero) * scale. Codes are signed, from -2^(bits-1) to 2^(bits-1) - 1, and so are
zeros: 0 is always on the grid, so what a mask removed stays removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..contract import check_choice
from ..finite import all_finite

BITS = (2, 3, 4, 8)
# Shares of a group's range that a clip search tries, widest first.
CLIPS = tuple(1.0 - 0.025 * step for step in range(29))
# Weights that are fitted at a time: they, and what is made of them, stay in a core's cache.
_CELLS = 1 << 18


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix in codes.

    Attributes
    ----------
    codes
        (out, in) int8.
    scale
        (out, groups) float32, above 0.
    zero
        (out, groups) int8, or None on a symmetric grid.
    group_size
        Consecutive inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    def dequantise(self) -> Tensor:
        """(codes - zero) * scale, (out, in) float32."""
        rows, size = self.codes.shape
        grouped = self.codes.view(rows, -1, self.group_size).float()
        if self.zero is not None:
            grouped = grouped - self.zero[:, :, None].float()
        return (grouped * self.scale[:, :, None]).view(rows, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How a matrix is put on a grid.

    Attributes
    ----------
    bits
        2, 3, 4 or 8.
    group_size
        Consecutive inputs that share a scale; 0 is a whole row. It must divide the inputs.
    symmetric
        No zero points: scale = 2 max|w| / (2^bits - 1). Otherwise the range from min(w, 0) to
        max(w, 0) is cut into 2^bits - 1 steps.
    clip
        Of `CLIPS`, the share of the range that gives the least squared error, for each group (the
        search of the GPTQ code, which raises errors to 2.4, starts at 1 and ends at 0.2).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        check_choice("bits", str(self.bits), tuple(map(str, BITS)))
        if self.group_size < 0:
            raise InputError(f"`group_size` must be at least 0; found {self.group_size}.")

    @property
    def low(self) -> int:
        """The lowest code; the highest is -low - 1."""
        return -(1 << (self.bits - 1))

    def size_of(self, inputs: int) -> int:
        """Inputs that share a scale, in a matrix of so many.

        Raises InputError where the group size does not divide them.
        """
        size = self.group_size or inputs
        if inputs % size:
            raise InputError(
                f"`group_size` {size} must divide the matrix's {inputs} inputs. Use a divisor, or"
                " 0 for one scale a row."
            )
        return size

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero for the groups (G, k): each (G,), in the weights' dtype.

        A group of zeros has scale 1.
        """
        low = weight.amin(1).clamp_(max=0)
        high = weight.amax(1).clamp_(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale, zero = self._of_range(low, high)
        if not self.clip:
            return scale, zero
        best = torch.full_like(scale, torch.inf)
        first_low, first_high = low, high
        work = torch.empty_like(weight)
        for share in CLIPS:
            tried, at = self._of_range(first_low * share, first_high * share)
            torch.div(weight, tried[:, None], out=work)
            if not self.symmetric:
                work.add_(at[:, None])
            work.round_().clamp_(self.low, -self.low - 1)
            if not self.symmetric:
                work.sub_(at[:, None])
            error = work.mul_(tried[:, None]).sub_(weight).square_().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, tried, scale)
            zero = torch.where(better, at, zero)
        return scale, zero

    def fit_matrix(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero, each (out, groups), of all groups of (out, in)."""
        rows, inputs = weight.shape
        size = self.size_of(inputs)
        groups = weight.reshape(-1, size)
        # By blocks of groups: the clip search goes over what it looks at many times.
        step = max(1, _CELLS // size)
        parts = [self.fit(groups[start : start + step]) for start in range(0, len(groups), step)]
        scale = torch.cat([part[0] for part in parts]).view(rows, -1)
        return scale, torch.cat([part[1] for part in parts]).view(rows, -1)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, in the weights' dtype; scale and zero broadcast."""
        made = weight.div(scale)
        if not self.symmetric:
            made.add_(zero)
        return made.round_().clamp_(self.low, -self.low - 1)

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # Scales are kept as float32: whatever the dtype of the work, they hold no more.
        scale = ((high - low) / (2**self.bits - 1)).float().to(low.dtype)
        # Of a group so small that its step rounds to 0 nothing is left but zeros.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        return scale, (self.low - low / scale).round_().clamp_(self.low, -self.low - 1)


def round_to_nearest(weight: Tensor, grid: Grid) -> Quantised:
    """Each weight of (out, in) on its nearest grid point; masked zeros stay 0.

    Raises InputError for a weight that is not finite, or a group size that does not fit.
    """
    if not all_finite(weight):
        row, column = (int(place) for place in (~torch.isfinite(weight)).nonzero()[0])
        raise InputError(
            f"weights are finite; found {float(weight[row, column])} at row {row}, column"
            f" {column}. Is the checkpoint sound?"
        )
    work = weight.float()
    scale, zero = grid.fit_matrix(work)
    rows, size = weight.shape
    codes = grid.codes(work.view(rows, scale.shape[1], -1), scale[:, :, None], zero[:, :, None])
    return packaged(codes.view(rows, size), scale, zero, grid)


def packaged(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Quantised:
    """Codes (out, in), scale and zero (out, groups) of any dtype in the dtypes that are kept."""
    return Quantised(
        codes.to(torch.int8).contiguous(),
        scale.float().contiguous(),
        None if grid.symmetric else zero.to(torch.int8).contiguous(),
        grid.size_of(codes.shape[1]),
    )
