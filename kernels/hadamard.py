"""Rotation by a block-diagonal Hadamard matrix, without the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch


def block_of(size: int) -> int:
    """The largest power of two that divides `size`: the default block."""
    check(size > 0, f"a rotation has at least one coordinate; found {size}")
    return size & -size


def hadamard(
    x: torch.Tensor,
    *,
    block: int | None = None,
    signs: torch.Tensor | None = None,
    inverse: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """x Q, or x Q' with `inverse`, for Q = diag(signs) (I ⊗ H) / sqrt(block), orthonormal.

    H is Sylvester's Hadamard matrix, H[i, j] = (-1) ** (number of bits that i and j share), of
    `block` rows. Rotating states and weights alike leaves a network's function as it is and
    spreads outliers over the coordinates (QuaRot, arXiv:2404.00456; the random signs are QuIP#'s,
    arXiv:2402.04396). Where d is no power of two, QuaRot takes a known Hadamard matrix of the odd
    part's multiple (12, 20, 28); here the largest power of two is rotated block by block, so an
    outlier stays within its block.

    Sums are float32 for half and single precision, and rounded once to the dtype of `x`; float64
    stays float64.

    Parameters
    ----------
    x
        (..., d) floating.
    block
        A power of two that divides d; None for the largest.
    signs
        (d,) of +1 and -1 in a floating dtype, or None for none.
    inverse
        Rotate back: Q Q' = I.
    impl
        "reference": the product with the matrix, in float64. "torch": two products with factors
        of about sqrt(block) rows, H_ab = H_a ⊗ H_b. "triton": a butterfly in registers. "auto":
        Triton on CUDA, torch elsewhere.

    Returns
    -------
    (..., d), in the dtype of `x`.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, a block that is no power of two or does not
        divide d, signs that are not +1 and -1.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, x)
    size = _check(x, signs)
    block = _block(size, block)
    if chosen == "triton":
        from .hadamard_triton import butterfly as run
    elif chosen == "torch":
        from .hadamard_torch import two_factors as run
    else:
        from .hadamard_torch import reference as run
    return run(x.reshape(-1, size), block, signs, inverse).reshape(x.shape)


def hadamard_matrix(
    size: int,
    *,
    block: int | None = None,
    signs: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """(size, size) Q of `hadamard`: `hadamard(x)` is x @ Q. Float32 where no dtype is given.

    Raises
    ------
    InputError
        A block that is no power of two or does not divide `size`, signs of another shape.
    """
    from .hadamard_torch import matrix

    block = _block(size, block)
    check(
        signs is None or signs.shape == (size,),
        f"signs are ({size},); found {None if signs is None else tuple(signs.shape)}",
    )
    return matrix(size, block, signs, dtype, device)


def _block(size: int, block: int | None) -> int:
    largest = block_of(size)
    if block is None:
        return largest
    check(
        block > 0 and block & (block - 1) == 0 and size % block == 0,
        f"block is a power of two that divides {size}, at most {largest}; found {block}",
    )
    return block


def _check(x: torch.Tensor, signs: torch.Tensor | None) -> int:
    """The number of coordinates."""
    check(
        x.dim() >= 1 and x.shape[-1] > 0 and x.is_floating_point(),
        f"x is (..., d) floating with d > 0; found {tuple(x.shape)} {x.dtype}",
    )
    size = x.shape[-1]
    if signs is not None:
        check(
            signs.shape == (size,) and signs.is_floating_point() and signs.device == x.device,
            f"signs are ({size},) floating on {x.device}; found {tuple(signs.shape)}"
            f" {signs.dtype} on {signs.device}",
        )
        check(bool((signs.abs() == 1).all()), "signs are +1 and -1; found other values")
    return size
