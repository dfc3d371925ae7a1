"""What stays makes up for what went: a bias of the mean, or weights fitted again.

Inputs x (T, in) of a linear map W (out, in); some inputs are removed, the others kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError


def bias_of(weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """What the removed inputs add on average: W[:, removed] mean[removed], (out,) float32.

    FLAP's compensation (arXiv:2312.11983, equation 4): with it the mean output is unchanged.

    Parameters
    ----------
    weight
        (out, in) before the removal.
    mean
        (in,) mean input over the calibration tokens.
    removed
        Positions (r,) int64.
    """
    at = removed.to(weight.device)
    lost = weight[:, at].double() @ mean.to(weight.device)[at].double()
    return lost.float()


def refit(weight: Tensor, gram: Tensor, kept: Tensor, *, damp: float = 0.01) -> Tensor:
    """Weights of the kept inputs that best give the old outputs, (out, k) float32.

    W' = argmin ||x Wᵀ - x_keep W'ᵀ||² + lambda ||W' - W_keep||², that is
    W_keep + W_gone G_gone,keep (G_keep,keep + lambda I)^-1, lambda = damp times the mean diagonal
    of G_keep,keep. Týr-the-Pruner's refit (arXiv:2503.09657) in closed form.

    Departure: the ridge pulls towards the kept weights, not towards zero, so that a strong one,
    or inputs that are dead, leave what was there. It is raised tenfold until the matrix can be
    factored.

    Parameters
    ----------
    weight
        (out, in) before the removal.
    gram
        (in, in) sum of x xᵀ.
    kept
        Positions (k,) int64, ascending.

    Raises InputError where the gram is not finite or of another size.
    """
    if gram.shape != (weight.shape[1], weight.shape[1]) or not bool(torch.isfinite(gram).all()):
        raise InputError(
            f"expected a finite gram of {weight.shape[1]} inputs; found shape {tuple(gram.shape)}"
            " or a NaN or infinity. Compute the statistics anew, in a wider dtype."
        )
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    removed = gone.nonzero()[:, 0]
    inner = gram[kept][:, kept].double()
    cross = gram[kept][:, removed].double()
    scale = float(inner.diagonal().mean()) or 1.0
    ridge, eye = damp * scale, torch.eye(len(kept), dtype=torch.float64, device=inner.device)
    for _ in range(12):
        factor, failed = torch.linalg.cholesky_ex(inner + ridge * eye)
        if not bool(failed):
            break
        ridge = max(ridge * 10, 1e-8 * scale)
    else:
        raise InputError(
            "expected a gram that can be factored once damped; found one that is not positive"
            " semi-definite. Compute the statistics anew, on more tokens."
        )
    old = weight.double().to(inner.device)
    moved = torch.cholesky_solve(cross @ old[:, removed].T, factor).T
    return (old[:, kept] + moved).float()


def relative_error(
    weight: Tensor, compressed: Tensor, gram: Tensor, bias: Tensor | None, mean: Tensor, count: int
) -> float:
    """||x W'ᵀ + b - x Wᵀ||_F / ||x Wᵀ||_F over the calibration tokens, from their sums.

    Parameters
    ----------
    weight, compressed
        W and W', both (out, in): removed inputs of W' are columns of zeros.
    gram, mean, count
        (in, in) sum of x xᵀ, (in,) mean of x, and number of tokens.
    bias
        b (out,), what was added to the bias, or None.

    0 where both norms are 0, infinite where only the second is.
    """
    gram = gram.double()
    change = compressed.double() - weight.double()
    squared = float(((change @ gram) * change).sum())
    if bias is not None:
        added = bias.double()
        squared += float(count * (2 * added @ (change @ mean.double()) + added @ added))
    whole = float(((weight.double() @ gram) * weight.double()).sum())
    if whole <= 0:
        return 0.0 if squared <= 0 else float("inf")
    return math.sqrt(max(squared / whole, 0.0))
