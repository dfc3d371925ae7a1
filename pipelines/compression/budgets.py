"""How much of each part of a model stays: one budget spread over layers, in whole groups.

A part (a matrix, the heads or the neurons of a layer) has `total` units of `cost` parameters
each. Everything here is NumPy on arrays of P parts; a density is the share of a part that stays,
so higher = more is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import BudgetError, InputError
from ...pruners.rules import best_first

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HALVINGS = 200
# CFSP divides a sum of angles over 128 rows of 2048 tokens by 10^4; per token that is this factor.
CFSP_STEEPNESS = 128 * 2048 / 1e4


@dataclass(frozen=True, slots=True)
class Units:
    """What the P parts are made of, all (P,) int64.

    Attributes
    ----------
    total
        Units in the part.
    cost
        Parameters of one unit.
    step
        A part keeps a multiple of it, or everything.
    low
        So many stay at the least.
    name
        Of each part, for messages.
    """

    total: Ints
    cost: Ints
    step: Ints
    low: Ints
    name: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return int((self.total * self.cost).sum())

    def lowest(self) -> Ints:
        """The fewest units that each part may keep: a multiple of its step, or everything."""
        up = -(-self.low // self.step) * self.step
        return np.asarray(np.minimum(up, self.total), np.int64)


def apportion(density: Floats, units: Units, target: int) -> Ints:
    """Whole numbers of units, near the densities, that cost at most `target` parameters, (P,).

    The densities are first moved by one common amount (clipped to what each part allows) so that
    they cost `target`; then each part keeps what lies below its wish, and the steps that are left
    go to the largest remainders, ties to the smaller index. What stays unspent is less than the
    cheapest step that is left. With cost and step 1, `target` is met exactly.

    Raises
    ------
    BudgetError
        The least that all parts must keep costs more than `target`.
    """
    low = units.lowest()
    least = int((low * units.cost).sum())
    if least > target:
        widest = int(np.argmax(low * units.cost))
        raise BudgetError(
            f"expected a budget of at least {least} parameters, which the smallest whole groups"
            f" cost (the most of them in {units.name[widest]}: {low[widest]} of"
            f" {units.total[widest]} units); found {target}. The nearest sparsity is"
            f" {1 - least / units.parameters:.4f}; lower `sparsity`, `min_keep` or `align`."
        )
    wish = _levelled(np.asarray(density, np.float64), units, low, target) * units.total
    # A wish that is whole but for rounding counts as whole.
    whole = np.floor(np.round(wish / units.step, 9)).astype(np.int64) * units.step
    full = np.round(wish - units.total, 9) >= 0
    keep = np.where(full, units.total, np.clip(whole, low, units.total))
    _give_back(keep, wish, units, low, target)
    _spend(keep, wish, units, target)
    return keep


def _levelled(density: Floats, units: Units, low: Ints, target: int) -> Floats:
    """The densities moved by one amount so that they cost `target`, within each part's bounds."""
    bottom = low / np.maximum(units.total, 1)
    weight = (units.total * units.cost).astype(np.float64)

    def moved(by: float) -> Floats:
        return np.clip(density + by, bottom, 1.0)

    return moved(_bisect(lambda by: float((moved(by) * weight).sum()), float(target)))


def _bisect(cost: Callable[[float], float], target: float) -> float:
    """The shift in [-2, 2] at which a rising function meets `target`; 0 where it does already."""
    if abs(cost(0.0) - target) <= 1e-9 * max(1.0, abs(target)):
        return 0.0
    low, high = -2.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return (low + high) / 2


def _up(keep: int, total: int, step: int) -> int:
    return min(total, (keep // step + 1) * step)


def _give_back(keep: Ints, wish: Floats, units: Units, low: Ints, target: int) -> None:
    """Take steps from the parts furthest above their wish until the budget holds."""
    while int((keep * units.cost).sum()) > target:
        lower = (keep - 1) // units.step * units.step
        surplus = np.where(lower >= low, (keep - wish) / units.total, -np.inf)
        keep[int(np.argmax(surplus))] = lower[int(np.argmax(surplus))]


def _spend(keep: Ints, wish: Floats, units: Units, target: int) -> None:
    """Give steps to the parts furthest below their wish while they fit."""
    left = target - int((keep * units.cost).sum())
    while True:
        lack = (wish - keep) / units.step
        gave = False
        for part in np.argsort(-lack, kind="stable"):
            higher = _up(int(keep[part]), int(units.total[part]), int(units.step[part]))
            gain = (higher - int(keep[part])) * int(units.cost[part])
            if 0 < gain <= left:
                keep[part] = higher
                left -= gain
                gave = True
        if not gave:
            return


def equal_widths(density: float, units: Units, kinds: Sequence[str], target: int) -> Ints:
    """The same number of units in every part of a kind, (P,).

    Kinds are rounded to the nearest whole number from the dearest step to the cheapest, each
    taking up what the ones before left over or overspent, so that the last misses the budget by
    at most half a step in each of its parts.
    """
    keep = np.zeros(len(kinds), np.int64)
    rows = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in dict.fromkeys(kinds)}

    def stride(kind: str) -> int:
        at = rows[kind]
        return int((units.step[at] * units.cost[at]).sum())

    left_target = target
    left_total = units.parameters
    low = units.lowest()
    order = sorted(rows, key=lambda kind: -stride(kind))
    for number, kind in enumerate(order):
        at = rows[kind]
        total, step = int(units.total[at[0]]), int(units.step[at[0]])
        cost, floor = int(units.cost[at].sum()), int(low[at].max())
        share = left_target / left_total if number else density
        keep[at] = count = _nearest(share * total, total, step, floor)
        left_target -= count * cost
        left_total -= total * cost
    return keep


def _nearest(wish: float, total: int, step: int, floor: int) -> int:
    """The allowed number nearest to a wish; ties to the higher."""
    wish = round(min(max(wish, floor), total), 9)
    below = total if wish >= total else max(floor, int(wish // step) * step)
    above = min(total, below + step - below % step) if below < total else total
    return below if wish - below < above - wish else above


def by_importance(importance: Floats, weight: Floats, density: float, steepness: float) -> Floats:
    """Densities of L layers that rise with their importance (CFSP, arXiv:2409.13199), (L,).

    density_l = sigmoid(steepness * (I_l - mean I)), scaled so that the mean weighted by `weight`
    (parameters) is `density`. Where one exceeds the ceiling, all are drawn towards the mean by
    the same factor, which keeps it; the paper's code divides by 1.05 times the highest, which
    does not. `importance` is the mean angle a token (share of pi) between what goes into the
    layer and what comes out; the paper's code sums over tokens and divides by 10^4, so that its
    shape depends on how many there were: CFSP_STEEPNESS is what 128 rows of 2048 tokens give.
    """
    check_layers(importance)
    mean = float(np.average(importance, weights=weight))
    made = 1.0 / (1.0 + np.exp(-steepness * (importance - mean)))
    made *= density / np.average(made, weights=weight)
    ceiling = max(1 / 1.05, (1 + density) / 2)
    if made.max() > ceiling:
        made = density + (made - density) * (ceiling - density) / (made.max() - density)
    return np.asarray(made, np.float64)


def by_cosine(
    cosine: Floats, weight: Floats, density: float, strength: float, *, increment: float = 0.05
) -> Floats:
    """Densities of L layers by how little they change a token (Adapt-Pruner, arXiv:2502.03460).

    I_l = -cosine_l (mean cosine of what goes in and what comes out), centred and divided by its
    largest magnitude; the sparsity grows by `increment` - strength * I_l at a time, within
    [0, 0.99]. Here all rounds use the dense model's importance (the method measures it anew while
    it trains), and one common shift at the end makes the weighted mean exactly `density`.
    """
    check_layers(cosine)
    importance = -(cosine - cosine.mean())
    largest = float(np.abs(importance).max())
    importance = importance / largest if largest > 0 else importance
    sparsity = np.zeros(len(cosine))
    rounds = max(1, round((1 - density) / increment))
    for _ in range(rounds):
        sparsity = np.clip(sparsity + (1 - density) / rounds - strength * importance, 0, 0.99)

    def moved(by: float) -> Floats:
        return np.clip(1 - sparsity + by, 0.01, 1.0)

    shift = _bisect(lambda by: float(np.average(moved(by), weights=weight)), density)
    return moved(shift)


def check_layers(values: Floats) -> None:
    """Refuse layers without a finite importance, by number."""
    if not np.isfinite(values).all():
        layer = int(np.argmin(np.isfinite(values)))
        raise InputError(
            f"expected a finite importance of every layer; found {values[layer]} for layer"
            f" {layer}. Compute the block statistics `angle` and `cosine` anew."
        )


def best_groups(score: Floats, cost: Ints, part: Ints, units: Units, target: int) -> Ints:
    """How many groups each part keeps when the best of all parts fill the budget, (P,).

    `score` (N,) higher = kept, `cost` (N,) parameters and `part` (N,) of every group; ties to the
    smaller position. First each part's best up to its floor, then the best of the rest in order
    until their cost reaches the budget: by less than one group more, never less, as
    `rules.top_cost` cuts.
    """
    order = best_first(score, np.arange(len(score), dtype=np.int64))
    low, taken = units.lowest(), np.zeros(len(score), np.bool_)
    kept = np.zeros(len(low), np.int64)
    for group in order:
        if kept[part[group]] < low[part[group]]:
            taken[group] = True
            kept[part[group]] += 1
    left = target - int(cost[taken].sum())
    for group in order[~taken[order]]:
        if left <= 0:
            break
        left -= int(cost[group])
        kept[part[group]] += 1
    return kept
