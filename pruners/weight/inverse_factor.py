"""The inverse Hessian of a matrix's inputs, factorised: what SparseGPT and GPTQ solve with.

H = (2/n) X X' over the calibration tokens, damped. Departures from the published code: inputs that
are always 0 take the mean diagonal of the others, not 1, so that the damping, a share of that
mean, does not depend on the scale of H; U is made by one Cholesky factorisation and one triangular
inverse (of H with its inputs reversed), not by inverting H and factorising again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..finite import all_finite

_DAMPINGS = 8
_SMALL = 128


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """U with U'U = (H + damping)^-1, for inputs in the order `order`.

    Attributes
    ----------
    upper
        (in, in) upper triangular, of the dtype of the work.
    dead
        (in,) bool: inputs that are always 0, in their own order.
    order
        (in,) int64 positions of the inputs as they are walked over, or None for their own order.
    damping
        Share of the mean diagonal that was added: the share asked for, times 10 for each time
        that the factorisation failed.
    """

    upper: Tensor
    dead: Tensor
    order: Tensor | None
    damping: float


def inverse_factor(
    gram: Tensor,
    tokens: int,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> InverseFactor:
    """Factorise the damped inverse Hessian of a matrix's inputs.

    Parameters
    ----------
    gram
        (in, in) sum over tokens of x x' (weighted, for RSQ); finite.
    tokens
        Their number; only the scale of H depends on it.
    damping
        Share of the mean diagonal (of inputs that are not always 0) added to the diagonal. Where
        the factorisation fails in `dtype` it is tried in float64, and then with ten times as much.
    act_order
        Inputs with the largest diagonal go first, ties by position.

    Raises
    ------
    InputError
        A gram matrix that is not square, not finite, or has a negative diagonal, no tokens, or
        one that cannot be factorised with a damping of 10^7 times the share asked for.
    """
    _check_gram(gram, tokens)
    diagonal = gram.diagonal().double() * (2.0 / tokens)
    dead = diagonal == 0
    live = ~dead
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    order = None
    if act_order:
        order = torch.where(dead, mean, diagonal).argsort(descending=True, stable=True)
    for attempt in range(_DAMPINGS):
        share = damping * 10.0**attempt
        for kind in dict.fromkeys((dtype, torch.float64)):
            upper = _factor(gram, tokens, dead, mean, share, order, kind)
            if upper is not None:
                return InverseFactor(upper.to(dtype), dead, order, share)
    raise InputError(
        f"the inputs' gram matrix cannot be factorised even with {share:g} of its mean diagonal"
        " added. Is it symmetric, and summed over the same tokens throughout?"
    )


def _factor(
    gram: Tensor,
    tokens: int,
    dead: Tensor,
    mean: float,
    share: float,
    order: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    hessian = gram.to(dtype) * (2.0 / tokens)
    diagonal = hessian.diagonal()
    diagonal[dead] = mean
    diagonal += share * mean
    if order is not None:
        hessian = hessian[order][:, order]
    # J H J = L L' gives H = (J L J)(J L J)' with J L J upper; its inverse is U.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        return None
    inverse = torch.zeros_like(lower)
    _invert_upper(lower.flip(0, 1), inverse)
    return inverse if all_finite(inverse) else None


def _invert_upper(upper: Tensor, out: Tensor) -> None:
    """Write the inverse of an upper triangular matrix to `out`, which is zero below.

    By halves, [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]: a third of the operations
    of a triangular solve with the identity.
    """
    size = len(upper)
    if size <= _SMALL:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        out.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    half = size // 2
    _invert_upper(upper[:half, :half], out[:half, :half])
    _invert_upper(upper[half:, half:], out[half:, half:])
    right = out[:half, :half] @ upper[:half, half:]
    out[:half, half:] = (right @ out[half:, half:]).neg_()


def _check_gram(gram: Tensor, tokens: int) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"a gram matrix is (in, in); found {tuple(gram.shape)}.")
    if tokens < 1:
        raise InputError(f"a gram matrix is summed over at least one token; found {tokens}.")
    if not all_finite(gram):
        row, column = (int(place) for place in (~torch.isfinite(gram)).nonzero()[0])
        raise InputError(
            f"a gram matrix is finite; found {float(gram[row, column])} for inputs {row} and"
            f" {column}. Do the calibration activations hold NaN, or overflow?"
        )
    if bool((gram.diagonal() < 0).any()):
        place = int((gram.diagonal() < 0).nonzero()[0])
        raise InputError(
            f"a gram matrix has no negative diagonal; found {float(gram[place, place])} for input"
            f" {place}. It is no sum of squares: make the statistics again."
        )
