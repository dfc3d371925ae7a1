"""One threshold on the scores of all weights of a model, found exactly in two passes.

The bits of a float32 that is not negative, read as an integer, are in the order of its value. A
first pass counts the upper 16 bits of every score, which tells where the threshold lies; a second
counts the lower 16 bits of the scores that share those upper ones. One block is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, RecipeError
from ...pruners.contract import Pruner
from ...pruners.models.block_layouts import weight_of
from .budgets import Ints
from .parts import Part

if TYPE_CHECKING:
    from .plan import Sources

_BINS = 1 << 16
_KNOWN = frozenset({"id", "output", "weight", "input_norm"})


def count_best_weights(
    sources: Sources, method: Pruner, parts: Sequence[Part], target: int
) -> Ints:
    """How many of each matrix are among the `target` highest scores of all, (P,) int64.

    Ties go to the earlier layer, then the earlier matrix. The score is the method's own formula.

    Raises
    ------
    RecipeError
        The method's score is not one of single weights.
    InputError
        Statistics are missing, or a score is negative or not finite.
    """
    importance: Any = getattr(method, "importance", None)
    if importance is None or not {"id", "weight"} <= method.needs <= _KNOWN:
        raise RecipeError(
            f"allocation global needs a score of single weights from their size and the norm of"
            f" their inputs; `{type(method).__name__}` has none. Use allocation uniform, erk or"
            " importance."
        )
    high = np.zeros((len(parts), _BINS), np.int32)
    for place, score in _scores(sources, method, parts):
        high[place] = _counts(_bits(score, parts[place]) >> 16)
    border, above = _border(high.sum(0, dtype=np.int64), target)
    low = np.zeros((len(parts), _BINS), np.int32)
    for place, score in _scores(sources, method, parts):
        bits = _bits(score, parts[place])
        low[place] = _counts(bits[bits >> 16 == border] & (_BINS - 1))
    cut, more = _border(low.sum(0, dtype=np.int64), target - above)
    counts = high[:, border + 1 :].sum(1, dtype=np.int64) + low[:, cut + 1 :].sum(1, dtype=np.int64)
    left = target - above - more
    for place in range(len(parts)):
        tied = min(left, int(low[place, cut]))
        counts[place] += tied
        left -= tied
    return np.asarray(counts, np.int64)


def _border(counts: Ints, target: int) -> tuple[int, int]:
    """The bin that the `target`-th highest lies in, and how many lie in the bins above it."""
    above = np.append(np.cumsum(counts[::-1])[::-1][1:], 0)
    border = int(np.flatnonzero(above + counts >= target)[-1]) if target else len(counts) - 1
    return border, int(above[border])


def _bits(score: Tensor, part: Part) -> Tensor:
    flat = score.reshape(-1).to(torch.float32) + 0.0  # -0 becomes 0
    if not bool((torch.isfinite(flat) & (flat >= 0)).all()):
        raise InputError(
            f"{part.name}: expected finite scores of at least 0; found others. Look at the weights"
            " of that matrix and at the statistics of its inputs."
        )
    return flat.view(torch.int32)


def _counts(values: Tensor) -> Ints:
    return np.asarray(torch.bincount(values, minlength=_BINS).numpy(), np.int64)


def _scores(
    sources: Sources, method: Pruner, parts: Sequence[Part]
) -> Iterator[tuple[int, Tensor]]:
    """Place of a part and the scores (out, in) of its weights, a block at a time."""
    importance: Any = method.importance  # type: ignore[attr-defined]
    model, layout = sources.model, sources.model.layout
    for layer in sorted({part.layer for part in parts}):
        block = model.block(layer)
        statistics = sources.layer(layer)
        inputs = {m.name: layout.input_of(m) for m in layout.matrices(block)}
        for place, part in enumerate(parts):
            if part.layer != layer:
                continue
            given: dict[str, Tensor] = {
                "weight": weight_of(block.get_submodule(part.module), layout).float().cpu()
            }
            if "input_norm" in method.needs:
                squares = statistics.get((inputs[part.module], "sum_squares"))
                if squares is None:
                    raise InputError(
                        f"{part.name}: allocation global needs the statistic `sum_squares` of its"
                        " inputs; found none. Give a weight_statistics step with it as input"
                        " `statistics`."
                    )
                given["input_norm"] = squares.sqrt().float()
            yield place, importance(**given)
