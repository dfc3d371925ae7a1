"""Wanda's scores and the mask they give, in one read of the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch


def wanda_mask(
    weight: torch.Tensor,
    norm: torch.Tensor,
    *,
    keep: float | None = None,
    pattern: tuple[int, int] | None = None,
    packed: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Which weights of each output row stay: the highest |W_ij| * norm_j (arXiv:2306.11695).

    Higher scores are kept, ties go to the smaller column. With `norm` of ones it is magnitude
    within each row. The published code drops int(in * sparsity) a row by a stable sort; here the
    number kept is ceil(keep * in), and tied scores lose from the right, not from the left.

    Scores are float32 products whatever the inputs are (float64 for "reference"): equal float32
    scores are ties.

    Parameters
    ----------
    weight
        (out, in) floating.
    norm
        (in,) floating, finite and at least 0: the norm of each input over the calibration
        tokens. Its scale does not matter.
    keep
        Share of each row to keep, in [0, 1]: exactly ceil(keep * in), where a product within
        1e-9 of a whole number is that number. Or None with `pattern`.
    pattern
        (n, m): n of each m consecutive inputs stay (2:4, 4:8); `in` is a multiple of m.
    packed
        Give bits instead: (out, ceil(in / 8)) uint8, bit b of byte c is column 8 c + b, and
        bits past the last column are 0. `unpack_mask` turns it back.
    impl
        "reference": a stable sort in float64. "torch": blocks of rows that stay in the cache; a
        histogram of exponents and leading bits finds the bucket of the border, and that alone is
        sorted. "triton": a program a row, which finds the border by bisecting the bits of the
        scores in registers; N:M by comparing ranks. "auto": Triton on CUDA, torch elsewhere.

    Returns
    -------
    (out, in) bool, True = kept; or the bits.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, both or neither of `keep` and `pattern`, one
        out of range, a norm or a score that is not finite (its row and column are named).
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, weight)
    _check(weight, norm)
    count = _count(weight.shape[1], keep, pattern)
    if chosen == "triton":
        from .wanda_triton import masked as run
    elif chosen == "torch":
        from .wanda_torch import blocked as run
    else:
        from .wanda_reference import reference as run
    mask, finite = run(weight, norm, count, pattern, packed)
    if not finite:
        _name_bad(weight, norm)
    return mask


def column_square_sums(x: torch.Tensor, out: torch.Tensor) -> None:
    """Add to `out` (in,) float32 the sum of squares of each column of x (T, in), in place.

    What the norms of `wanda_mask` are the roots of. Squares and sums are float32, block by block
    of rows, in an order that depends on the shape alone. Seven times as fast on a CPU as
    `x.square().sum(0)`, whose squares go through main memory.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.
    """
    import torch

    check(
        x.dim() == 2 and x.is_floating_point(),
        f"x is (T, in) floating; found {tuple(x.shape)} {x.dtype}",
    )
    check(
        out.shape == x.shape[1:] and out.dtype == torch.float32 and out.device == x.device,
        f"out is ({x.shape[1]},) float32 on {x.device}; found {tuple(out.shape)} {out.dtype} on"
        f" {out.device}",
    )
    from .wanda_torch import add_squares

    add_squares(x, out)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """(out, in) bool as bits, (out, ceil(in / 8)) uint8: bit b of byte c is column 8 c + b."""
    import torch

    check(
        mask.dim() == 2 and mask.dtype == torch.bool,
        f"mask is (out, in) bool; found {tuple(mask.shape)} {mask.dtype}",
    )
    from .wanda_torch import pack

    return pack(mask)


def unpack_mask(bits: torch.Tensor, size: int) -> torch.Tensor:
    """(out, size) bool of the bits that `pack_mask` made, (out, ceil(size / 8)) uint8."""
    import torch

    check(
        bits.dim() == 2 and bits.dtype == torch.uint8 and bits.shape[1] == -(-size // 8),
        f"bits of {size} columns are (out, {-(-size // 8)}) uint8; found {tuple(bits.shape)}"
        f" {bits.dtype}",
    )
    from .wanda_torch import unpack

    return unpack(bits, size)


def _count(size: int, keep: float | None, pattern: tuple[int, int] | None) -> int:
    """How many of a row stay."""
    check(
        (keep is None) != (pattern is None),
        f"give one of keep and pattern; found keep={keep} and pattern={pattern}",
    )
    if pattern is not None:
        n, m = pattern
        check(0 < n <= m, f"pattern is (n, m) with 0 < n <= m; found {pattern}")
        check(
            size % m == 0,
            f"pattern {n}:{m} needs a number of inputs that is a multiple of {m}; found {size}."
            " Leave this layer out or use keep",
        )
        return size // m * n
    share = float(keep or 0.0)
    check(0.0 <= share <= 1.0, f"keep is a share in [0, 1]; found {keep}")
    return min(size, math.ceil(round(share * size, 9)))


def _check(weight: torch.Tensor, norm: torch.Tensor) -> None:
    import torch

    check(
        weight.dim() == 2 and norm.shape == weight.shape[1:],
        f"weight is (out, in) and norm (in,); found {tuple(weight.shape)} and {tuple(norm.shape)}",
    )
    for name, tensor in (("weight", weight), ("norm", norm)):
        check(tensor.is_floating_point(), f"{name} is of a floating dtype; found {tensor.dtype}")
    check(norm.device == weight.device, f"norm is on {weight.device}; found {norm.device}")
    bad = ~(torch.isfinite(norm) & (norm >= 0))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        check(
            False,
            f"norm is finite and at least 0; found {float(norm[first])} at column {first}. Do"
            " the calibration activations hold NaN or infinity?",
        )


def _name_bad(weight: torch.Tensor, norm: torch.Tensor) -> None:
    import torch

    for row, values in enumerate(weight):
        bad = ~torch.isfinite(values.float().abs() * norm.float())
        if bool(bad.any()):
            column = int(bad.nonzero()[0])
            check(
                False,
                f"scores are finite; found weight {float(values[column])} times norm"
                f" {float(norm[column])} at row {row}, column {column}. Is the checkpoint sound?",
            )
