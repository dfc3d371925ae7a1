"""Weights that make up for others that were removed or rounded: SparseGPT and GPTQ.

Both walk over a matrix's inputs in a fixed order. What input i loses, the inputs after it make up
for, by the row i of U, the upper Cholesky factor of the inverse of H = (2/n) X X' (SparseGPT,
arXiv:2301.00774; GPTQ, arXiv:2210.17323; optimal brain surgeon for each row of the matrix):

    error = (w_i - q_i) / U_ii,  w_j <- w_j - error * U_ij  for j > i

where q_i is w_i masked, rounded, or both. Inputs go in blocks, and those in runs of a few: a step
updates its own run at once, a run's errors go to the rest of its block in one matrix product, and
a block's errors to the rest of the matrix in another.

Departures from the published code, besides those of `inverse_factor`: exact counts; a group's
scale comes from the weights as they stand when its first input is reached (the code for groups
smaller than a block reads stale ones); a block's mask is fixed for a few inputs at a time, since
inputs whose mask is fixed together do not see each other's updates (`Chosen.together`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .inverse_factor import InverseFactor
from .masks import keep_count, keep_pattern
from .quantisers import Grid, Quantised, packaged

# Inputs of a run at best: their weights for a few thousand outputs stay in a core's cache.
_RUNS = (32, 16, 8)

# (weights (out, k), squared diagonal of U (k,)) -> scores (out, k), higher = kept.
Score = Callable[[Tensor, Tensor], Tensor]


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
    together
        Inputs whose mask is fixed at a time; None for 16, or 32 of 256 inputs and more. They
        compete with the rest of their block for what is left of its share, so the block's count
        is met and falls where it costs least. A block or more is the published way: one mask a
        block, chosen before any of its updates.
    """

    score: Score
    count: int = 0
    pattern: tuple[int, int] | None = None
    together: int | None = None

    def at_once(self, inputs: int) -> int:
        """Inputs whose mask is fixed at a time in a matrix of so many."""
        if self.pattern is not None:
            return self.pattern[1]
        return self.together or (16 if inputs < 256 else 32)


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
        self.run_size = self._run_size()
        self.left = 0

    def _aligned(self, block: int) -> int:
        sizes = [self.group] if self.grid is not None and not self.before else []
        if self.chosen is not None and self.chosen.pattern is not None:
            sizes.append(self.chosen.pattern[1])
        step = math.lcm(*sizes) if sizes else 1
        return max(step, block - block % step)

    def _run_size(self) -> int:
        """Inputs of a run: updates must have reached all weights that are looked at together."""
        spans = [self.group] if self.grid is not None and not self.before else []
        step = None if self.chosen is None else self.chosen.at_once(self.inputs)
        if step is not None and self.chosen is not None and self.chosen.pattern is not None:
            spans.append(step)
            step = None  # of a pattern; else all of the block from here on is looked at
        for run in _RUNS:
            within = all(span % run == 0 or run % span == 0 for span in spans)
            if within and (step is None or step >= self.block or step % run == 0):
                return run
        return self.block

    def run(self) -> None:
        for start in range(0, self.inputs, self.block):
            stop = min(start + self.block, self.inputs)
            errors = self._block(start, stop)
            if stop < self.inputs:
                self.work[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)

    def _block(self, start: int, stop: int) -> Tensor:
        """Solve inputs start to stop; gives their errors (stop - start, out)."""
        work, upper = self.work[start:stop], self.upper[start:stop, start:stop]
        diagonal, size = upper.diagonal(), stop - start
        errors = torch.empty_like(work)
        # Read once: a number of a tensor a step would wait for the device each time.
        pivots = diagonal.tolist()
        for first in range(0, size, self.run_size):
            last = min(first + self.run_size, size)
            for i in range(first, last):
                self._choose(start, i, work, diagonal)
                self._fit_group(start, i)
                kept = self._kept(start + i, work[i])
                error = torch.sub(work[i], kept, out=errors[i]).div_(pivots[i])
                work[i] = kept
                if i + 1 < last:
                    work[i + 1 : last].addr_(upper[i, i + 1 : last], error, alpha=-1)
            if last < size:
                work[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1)
        return errors

    def _choose(self, start: int, i: int, work: Tensor, diagonal: Tensor) -> None:
        """Choose what stays of the inputs from the block's i-th on, where their turn has come."""
        if self.chosen is None or self.mask is None:
            return
        step = self.chosen.at_once(self.inputs)
        if i % step:
            return
        pattern = self.chosen.pattern
        # The rest of the block competes for what is left of its share; only those next are fixed.
        stop, fixed = (i + step if pattern else len(work)), min(i + step, len(work))
        score = self.chosen.score(work[i:stop].T, diagonal[i:stop].square()).contiguous()
        if pattern is not None:
            mask = keep_pattern(score, *pattern)
        else:
            if i == 0:
                total, last = self.chosen.count, start + len(work)
                self.left = total * last // self.inputs - total * start // self.inputs
            mask = keep_count(score, self.left)[:, : fixed - i]
            self.left -= int(mask.sum())
        self.mask[start + i : start + fixed] = mask.T

    def _fit_group(self, start: int, i: int) -> None:
        if self.grid is None or self.before or i % self.group:
            return
        first = start + i
        weights = self.work[first : first + self.group]
        # Of inputs whose turn has not come, all still count as kept.
        if self.mask is not None:
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
        if not self.grid.symmetric:
            codes.sub_(zero)
        return codes.mul_(scale)

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
    together = None if chosen is None else chosen.together
    for name, value in (("block", block), ("together", 1 if together is None else together)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1; found {value}.")
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
