"""Masks of whole matrices at exact counts: over the matrix, within rows, n of m.

Scores are (out, in), higher = kept, compared in their own dtype; ties go to the smaller place
(row by row). Every mask is (out, in) bool, True = kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.wanda import wanda_mask
from .. import rules
from ..contract import check_fraction
from ..finite import all_finite


def keep_matrix(score: Tensor, keep: float) -> Tensor:
    """The ceil(keep * out * in) highest of a matrix."""
    check_fraction("keep", keep)
    return keep_count(score, rules.count_of(score.numel(), keep))


def keep_rows(score: Tensor, keep: float) -> Tensor:
    """The ceil(keep * in) highest of every row."""
    check_fraction("keep", keep)
    return _of_each_row(score, rules.count_of(score.shape[1], keep))


def keep_count(score: Tensor, count: int) -> Tensor:
    """The `count` highest of a matrix.

    Raises InputError for a count outside 0 to out * in, or a score that is not finite.
    """
    _check(score)
    flat = score.reshape(-1)
    size = flat.numel()
    if not 0 <= count <= size:
        raise InputError(f"a mask of {size} weights keeps 0 to {size} of them; found {count}.")
    if count in (0, size):
        return torch.full_like(score, bool(count), dtype=torch.bool)
    border = _kth_lowest(flat, size - count + 1)
    mask = flat > border
    tied = (flat == border).nonzero()[:, 0]
    mask[tied[: count - int(mask.count_nonzero())]] = True
    return mask.view(score.shape)


def keep_count_by_row(score: Tensor, count: int) -> Tensor:
    """`count` weights of a matrix, the highest of each row, as evenly over rows as it goes.

    Every row keeps floor(count / out); the first count % out rows keep one more.
    """
    rows, size = score.shape
    if not 0 <= count <= rows * size:
        raise InputError(
            f"a mask of {rows * size} weights keeps 0 to {rows * size} of them; found {count}."
        )
    each, more = divmod(count, rows)
    if not more:
        return _of_each_row(score, each)
    return torch.cat([_of_each_row(score[:more], each + 1), _of_each_row(score[more:], each)])


def keep_wanda(weight: Tensor, norm: Tensor, count: int) -> Tensor:
    """`keep_count_by_row` of |weight| * norm, (out, in) and (in,), in one read of the weights."""
    each, more = divmod(count, weight.shape[0])
    size = weight.shape[1]
    if not more:
        return wanda_mask(weight, norm, keep=each / size)
    return torch.cat(
        [
            wanda_mask(weight[:more], norm, keep=(each + 1) / size),
            wanda_mask(weight[more:], norm, keep=each / size),
        ]
    )


def keep_pattern(score: Tensor, n: int, m: int) -> Tensor:
    """The n highest of each m consecutive inputs of every row.

    Raises InputError unless 0 < n <= m and m divides the number of inputs.
    """
    _check(score)
    size = score.shape[1]
    if not 0 < n <= m or size % m:
        raise InputError(
            f"pattern {n}:{m} keeps n of each m inputs with 0 < n <= m, and m divides their number;"
            f" found {size} inputs. Use another pattern, or leave this matrix out."
        )
    if _for_the_kernel(score):
        return wanda_mask(score, torch.ones_like(score[0]), pattern=(n, m))
    return _sorted(score.reshape(-1, m), n).view(score.shape)


def _of_each_row(score: Tensor, count: int) -> Tensor:
    _check(score)
    if _for_the_kernel(score):
        # count / size of size is count again: the kernel rounds what a float's last bit adds.
        share = count / score.shape[1]
        return wanda_mask(score, torch.ones_like(score[0]), keep=share)
    return _sorted(score, count)


def _for_the_kernel(score: Tensor) -> bool:
    """Whether the kernel's comparison, of magnitudes in float32, is that of the scores."""
    narrow = score.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return narrow and score.numel() > 0 and bool(score.min() >= 0)


def _sorted(score: Tensor, count: int) -> Tensor:
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def _kth_lowest(flat: Tensor, k: int) -> Tensor:
    if flat.is_cuda:
        return flat.sort().values[k - 1]
    # NumPy partitions four times as fast as torch's kthvalue; it knows no bfloat16.
    values = flat.float() if flat.element_size() < 4 else flat
    found = np.partition(values.numpy(), k - 1)[k - 1 : k]
    return torch.from_numpy(found)[0]


def _check(score: Tensor) -> None:
    if score.dim() != 2:
        raise InputError(f"scores are (out, in); found {tuple(score.shape)}.")
    if not all_finite(score):
        row, column = (int(place) for place in (~torch.isfinite(score)).nonzero()[0])
        raise InputError(
            f"scores are finite; found {float(score[row, column])} at row {row}, column {column}."
            " Look at that weight and at the statistics of that input."
        )
