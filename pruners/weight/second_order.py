"""Weights that make up for others that were removed or rounded: SparseGPT and GPTQ.

Both walk over a matrix's inputs in a fixed order. What input i loses, the inputs after it make up
for, by the row i of U, the upper Cholesky factor of the inverse of H = (2/n) X X' (SparseGPT,
arXiv:2301.00774; GPTQ, arXiv:2210.17323; optimal brain surgeon for each row of the matrix):

    error = (w_i - q_i) / U_ii,  w_j <- w_j - error * U_ij  for j > i

where q_i is w_i masked, rounded, or both. Inputs go in blocks: inside a block each step updates
the block's own inputs, and the rest get all of a block's errors in one matrix product.

Departures from the published code: exact counts; a group's scale comes from the weights as they
stand when its first input is reached (the code for groups smaller than a block reads stale ones);
inputs that are always 0 take the mean diagonal of the others, not 1, so that the damping, a share
of that mean, does not depend on the scale of H; U is made by one Cholesky factorisation and one
triangular inverse (of H with its inputs reversed), not by inverting H and factorising again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .masks import keep_count, keep_pattern
from .quantisers import Grid, Quantised, packaged

_DAMPINGS = 8
_SMALL = 128

# (weights (out, k), squared diagonal of U (k,)) -> scores (out, k), higher = kept.
Score = Callable[[Tensor, Tensor], Tensor]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How the walk chooses what stays, on weights that carry the updates so far.

    Attributes
    ----------
    score
        Of the weights of some inputs.
    count
        Weights of the matrix to keep; each block keeps its share to the last weight, and all
        together keep exactly so many.
    pattern
        (n, m) instead: n of each m consecutive inputs of a row.
    """

    score: Score
    count: int = 0
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Solved:
    """What the walk made.

    Attributes
    ----------
    weight
        (out, in) in the dtype of the work.
    mask
        (out, in) bool, True = kept; None where nothing was masked.
    quantised
        The codes of `weight`, which are exactly it; None without a grid.
    """

    weight: Tensor
    mask: Tensor | None
    quantised: Quantised | None


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
    return inverse if bool(torch.isfinite(inverse).all()) else None


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


def solve(
    weight: Tensor,
    factor: InverseFactor,
    *,
    chosen: Chosen | None = None,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    block: int = 128,
) -> Solved:
    """Mask and round a matrix, input by input, the others making up for it.

    Parameters
    ----------
    weight
        (out, in) of any floating dtype; it is not written to.
    factor
        Of its inputs, on the same device; its dtype is that of the work.
    chosen, mask
        How the walk chooses what stays, or (out, in) bool of what does. Neither masks nothing.
    grid
        What the weights that stay are rounded to; None leaves them as they are.
    block
        Inputs solved together; made a multiple of group size and pattern where these are smaller,
        and grown to them where they are larger.

    Raises
    ------
    InputError
        Shapes that do not fit; both `chosen` and `mask`; a pattern or group size that does not
        divide the inputs; a pattern that the walk is to choose with inputs out of their order.
    """
    _check_solve(weight, factor, chosen, mask, block)
    walk = _Walk(weight, factor, chosen, mask, grid, block)
    walk.run()
    return walk.result()


class _Walk:
    """The state of one walk. Matrices are (in, out) here: an input's weights lie side by side."""

    def __init__(
        self,
        weight: Tensor,
        factor: InverseFactor,
        chosen: Chosen | None,
        mask: Tensor | None,
        grid: Grid | None,
        block: int,
    ) -> None:
        self.factor, self.chosen, self.grid = factor, chosen, grid
        self.upper = factor.upper
        self.outs, self.inputs = weight.shape
        work = weight.to(factor.upper.dtype, copy=True)
        work[:, factor.dead] = 0
        order = factor.order
        self.group = grid.size_of(self.inputs) if grid is not None else self.inputs
        self.scale = self.zero = torch.empty(0)
        if grid is not None:
            # Groups that the walk does not meet one by one are fitted before it.
            self.before = order is not None or self.group == self.inputs
            shape = (self.inputs // self.group, self.outs)
            if self.before:
                fitted = work if mask is None else work * mask
                self.scale, self.zero = (part.T.contiguous() for part in grid.fit_matrix(fitted))
            else:
                self.scale = torch.ones(shape, dtype=work.dtype, device=work.device)
                self.zero = torch.zeros_like(self.scale)
            self.codes = torch.empty((self.inputs, self.outs), dtype=torch.int8, device=work.device)
        self.columns = torch.arange(self.inputs) if order is None else order.cpu()
        self.work = (work if order is None else work[:, order]).T.contiguous()
        self.mask: Tensor | None = None
        if mask is not None:
            self.mask = (mask if order is None else mask[:, order]).T.contiguous()
        elif chosen is not None:
            self.mask = torch.ones_like(self.work, dtype=torch.bool)
        self.block = self._aligned(block)

    def _aligned(self, block: int) -> int:
        sizes = [self.group] if self.grid is not None and not self.before else []
        if self.chosen is not None and self.chosen.pattern is not None:
            sizes.append(self.chosen.pattern[1])
        step = math.lcm(*sizes) if sizes else 1
        return max(step, block - block % step)

    def run(self) -> None:
        for start in range(0, self.inputs, self.block):
            stop = min(start + self.block, self.inputs)
            errors = self._block(start, stop)
            if stop < self.inputs:
                self.work[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)

    def _block(self, start: int, stop: int) -> Tensor:
        """Solve inputs start to stop; gives their errors (stop - start, out)."""
        work, upper = self.work[start:stop], self.upper[start:stop, start:stop]
        diagonal = upper.diagonal()
        if self.chosen is not None and self.chosen.pattern is None:
            assert self.mask is not None
            total = self.chosen.count
            count = total * stop // self.inputs - total * start // self.inputs
            score = self.chosen.score(work.T, diagonal.square())
            self.mask[start:stop] = keep_count(score, count).T
        errors = torch.empty_like(work)
        # Read once: a number of a tensor a step would wait for the device each time.
        pivots = diagonal.tolist()
        for i in range(stop - start):
            self._choose_pattern(start, i, work, diagonal)
            self._fit_group(start, i)
            kept = self._kept(start + i, work[i])
            error = torch.sub(work[i], kept, out=errors[i]).div_(pivots[i])
            work[i] = kept
            if i + 1 < stop - start:
                work[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
        return errors

    def _choose_pattern(self, start: int, i: int, work: Tensor, diagonal: Tensor) -> None:
        if self.chosen is None or self.chosen.pattern is None:
            return
        n, m = self.chosen.pattern
        if i % m == 0:
            assert self.mask is not None
            score = self.chosen.score(work[i : i + m].T, diagonal[i : i + m].square())
            self.mask[start + i : start + i + m] = keep_pattern(score.contiguous(), n, m).T

    def _fit_group(self, start: int, i: int) -> None:
        if self.grid is None or self.before or i % self.group:
            return
        first = start + i
        weights = self.work[first : first + self.group]
        # A pattern chosen on the way is not known beyond its m inputs yet.
        if self.mask is not None and (self.chosen is None or self.chosen.pattern is None):
            weights = weights * self.mask[first : first + self.group]
        place = first // self.group
        self.scale[place], self.zero[place] = self.grid.fit(weights.T.contiguous())

    def _kept(self, place: int, weights: Tensor) -> Tensor:
        """What an input's weights (out,) become."""
        mask = None if self.mask is None else self.mask[place]
        if self.grid is None:
            return weights if mask is None else weights * mask
        group = int(self.columns[place]) // self.group
        scale, zero = self.scale[group], self.zero[group]
        codes = self.grid.codes(weights, scale, zero)
        if mask is not None:
            codes = torch.where(mask, codes, zero)
        self.codes[place] = codes.to(torch.int8)
        return codes.sub_(zero).mul_(scale)

    def result(self) -> Solved:
        weight = self._in_order(self.work)
        mask = None if self.mask is None else self._in_order(self.mask)
        quantised = None
        if self.grid is not None:
            codes = self._in_order(self.codes)
            quantised = packaged(codes, self.scale.T, self.zero.T, self.grid)
        return Solved(weight, mask, quantised)

    def _in_order(self, made: Tensor) -> Tensor:
        if self.factor.order is None:
            return made.T.contiguous()
        back = torch.empty_like(made)
        back[self.factor.order] = made
        return back.T.contiguous()


def _check_gram(gram: Tensor, tokens: int) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"a gram matrix is (in, in); found {tuple(gram.shape)}.")
    if tokens < 1:
        raise InputError(f"a gram matrix is summed over at least one token; found {tokens}.")
    if not bool(torch.isfinite(gram).all()):
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


def _check_solve(
    weight: Tensor, factor: InverseFactor, chosen: Chosen | None, mask: Tensor | None, block: int
) -> None:
    size = len(factor.dead)
    if weight.dim() != 2 or weight.shape[1] != size:
        raise InputError(
            f"a matrix is (out, in) with the {size} inputs of its statistics; found"
            f" {tuple(weight.shape)}."
        )
    if mask is not None and (chosen is not None or mask.shape != weight.shape):
        raise InputError(
            f"a mask is {tuple(weight.shape)} and given alone; found {tuple(mask.shape)}"
            f"{' and a score to choose by' if chosen is not None else ''}."
        )
    if block < 1:
        raise InputError(f"`block` must be at least 1; found {block}.")
    if chosen is None or chosen.pattern is None:
        return
    n, m = chosen.pattern
    if not 0 < n <= m or size % m:
        raise InputError(
            f"pattern {n}:{m} keeps n of each m inputs with 0 < n <= m, and m divides their number;"
            f" found {size} inputs. Use another pattern, or leave this matrix out."
        )
    if factor.order is not None:
        raise InputError(
            f"pattern {n}:{m} is of consecutive inputs, and `act_order` walks over them in"
            " another order. Turn it off, or choose the mask before (wanda, magnitude)."
        )
