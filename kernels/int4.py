"""Products with 4-bit weights: packing, unpacking, and x W' without W in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch

WORD = 8  # 4-bit values of an int32


@dataclass(frozen=True)
class Int4Library:
    """A packed weight in the layout of torch's own kernel, as `prepare_int4` made it.

    Attributes
    ----------
    weight
        What torch's conversion gives; its layout is torch's affair.
    scale_and_zero
        (groups, out, 2): the scale, and what is added to scale times value.
    group_size
        Inputs a group.
    """

    weight: torch.Tensor
    scale_and_zero: torch.Tensor
    group_size: int


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 in [-8, 7] to (out, ceil(in / 8)) int32, as compressed-tensors packs them.

    Each value plus 8 is a nibble; eight consecutive inputs make a word, the first in its lowest
    bits; nibbles past the last input are 0. That is `weight_packed` of the format
    "pack-quantized" at 4 bits; a zero point is packed so along the rows: `pack_int4(zero.T).T`.

    Raises
    ------
    InputError
        Another shape or dtype, or a value out of range.
    """
    import torch

    check(
        values.dim() == 2 and values.dtype == torch.int8,
        f"values are (out, in) int8; found {tuple(values.shape)} {values.dtype}",
    )
    bad = (values < -8) | (values > 7)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        check(
            False,
            f"4-bit values are in [-8, 7]; found {int(values[row, column])} at row {row},"
            f" column {column}",
        )
    from .int4_torch import pack

    return pack(values)


def unpack_int4(packed: torch.Tensor, size: int) -> torch.Tensor:
    """(out, size) int8 in [-8, 7] of what `pack_int4` made, (out, ceil(size / 8)) int32.

    Raises
    ------
    InputError
        Another shape or dtype.
    """
    from .int4_torch import unpack

    _check_packed(packed, size)
    return unpack(packed, size)


def prepare_int4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    size: int,
) -> Int4Library | None:
    """The weight in the layout of torch's own bfloat16 kernel, or None where it takes no such.

    torch's kernels take groups of 32, 64, 128 or 256 that divide `in`, and `out` in multiples of
    16 (on CUDA `in` in multiples of 128). Scales are rounded to bfloat16 (compressed-tensors
    stores them in the model's dtype), and so is zero times scale. What the conversion gives is
    tried on one row and refused where it differs from ours. Arguments as for `int4_matmul`.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.
    """
    from .int4_library import prepare

    _check_weight(packed, scale, zero, group_size, size)
    return prepare(packed, scale, zero, group_size, size)


def int4_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    *,
    prepared: Int4Library | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """x W' for W[o, i] = (value[o, i] - zero[o, g]) * scale[o, g] with g = i // group_size.

    Parameters
    ----------
    x
        (B, in) floating.
    packed
        (out, ceil(in / 8)) int32, by `pack_int4`.
    scale
        (out, groups) floating, groups = ceil(in / group_size).
    zero
        (out, groups) int8 in [-8, 7], or None for 0 (symmetric).
    group_size
        Inputs a group, a multiple of 8; or `in` and above for one group a row.
    prepared
        What `prepare_int4` made of the same weight. With impl="auto" it is used for bfloat16 x
        of at most `int4_library.MOST_ROWS` rows, beyond which a dense product is faster.
    impl
        "reference": float64. "torch": rows of W a few at a time, rounded to the dtype of x.
        "triton": W made tile by tile, in the same rounding; partial sums over parts of the
        inputs, no atomics. "auto": `prepared` where it fits, else Triton on CUDA, torch
        elsewhere.

    Returns
    -------
    (B, out) in the dtype of x.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, x)
    check(
        x.dim() == 2 and x.is_floating_point() and x.device == packed.device,
        f"x is (B, in) floating on {packed.device}; found {tuple(x.shape)} {x.dtype} on {x.device}",
    )
    _check_weight(packed, scale, zero, group_size, x.shape[1])
    if impl == "auto" and prepared is not None:
        from .int4_library import fits, product

        if fits(x, prepared, len(packed)):
            return product(x, prepared)
    if chosen == "triton":
        from .int4_triton import tiled as run
    elif chosen == "torch":
        from .int4_torch import blocked as run
    else:
        from .int4_torch import reference as run
    return run(x, packed, scale, zero, group_size)


def _check_packed(packed: torch.Tensor, size: int) -> None:
    import torch

    check(
        packed.dim() == 2 and packed.dtype == torch.int32 and packed.shape[1] == -(-size // WORD),
        f"packed is (out, {-(-size // WORD)}) int32 for {size} inputs; found"
        f" {tuple(packed.shape)} {packed.dtype}",
    )


def _check_weight(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    size: int,
) -> None:
    import torch

    _check_packed(packed, size)
    check(
        group_size > 0 and (group_size % WORD == 0 or group_size >= size),
        f"group_size is a multiple of {WORD}, or all {size} inputs; found {group_size}",
    )
    shape = (len(packed), -(-size // group_size))
    check(
        scale.shape == shape and scale.is_floating_point() and scale.device == packed.device,
        f"scale is {shape} floating on {packed.device}; found {tuple(scale.shape)} {scale.dtype}"
        f" on {scale.device}",
    )
    if zero is not None:
        check(
            zero.shape == shape and zero.dtype == torch.int8 and zero.device == packed.device,
            f"zero is {shape} int8 on {packed.device}; found {tuple(zero.shape)} {zero.dtype} on"
            f" {zero.device}",
        )
