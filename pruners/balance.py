"""A floor and a cap for every class or group, over the scores of any method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import BudgetError, InputError
from . import rules
from .contract import BoolArray, IntArray, Selection

REASONS = ("kept_for_group", "gave_way", "group_full")


@dataclass(frozen=True, slots=True)
class Balance:
    """How far the share of a group may leave its share of the table.

    A selection of m of N rows would hold m * n / N rows of a group of n rows if it took groups
    alike. Each group keeps at least `floor` and at most `cap` times that: a class-balance floor
    as of Sorscher et al. 2022 (arXiv:2206.14486), and a cap beside it. floor = cap = 1 is the
    stratified selection, to a row a group.

    Attributes
    ----------
    floor
        0 to 1, higher protects small groups more. Above 0 every group keeps a row.
    cap
        At least 1, lower holds large groups down; None for no cap.
    """

    floor: float = 0.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 1.0:
            raise InputError(f"`floor` must lie in [0, 1]; found {self.floor}.")
        if self.cap is not None and not 1.0 <= self.cap < float("inf"):
            raise InputError(f"`cap` must be a number of at least 1, or None; found {self.cap}.")

    def limits(self, sizes: IntArray, count: int) -> tuple[IntArray, IntArray]:
        """Fewest and most rows of each group, (G,) int64 each, of groups of `sizes` (G,).

        Their sums enclose `count`.

        Raises
        ------
        BudgetError
            The floor asks for a row of every group, and there are more groups than rows to keep.
        """
        total = int(sizes.sum())
        fewest = np.zeros(len(sizes), np.int64)
        most = sizes.astype(np.int64)
        if count and total:
            share = count / total
            if self.floor > 0:
                fewest = np.maximum(rules.counts_of(sizes, self.floor * share, rounded="down"), 1)
                fewest = _lowered(fewest, count)
            if self.cap is not None and self.cap * share < 1.0:
                most = np.maximum(rules.counts_of(sizes, self.cap * share), fewest)
        return fewest, most


def _lowered(fewest: IntArray, count: int) -> IntArray:
    """Floors whose sum fits: the row that every group is given can exceed the budget."""
    if len(fewest) > count:
        raise BudgetError(
            f"a floor above 0 keeps a row of each of the {len(fewest)} groups, and the budget is"
            f" {count} rows. Keep more rows, or set `floor` to 0."
        )
    made = fewest.copy()
    while made.sum() > count:
        made[made.argmax()] -= 1
    return made


def balanced(selection: Selection, ids: IntArray, group: IntArray, balance: Balance) -> Selection:
    """The selection of as many rows that keeps to the floor and cap of every group.

    Of each group its fewest rows come first, then rows by the method's own order (those that
    it kept, then by score, ties by smaller id) as long as their group has room. Where no limit
    binds, nothing changes. Scores and thresholds stay the method's. Unlike the method, the
    result need not be nested in the budget: limits move with it.

    Parameters
    ----------
    selection
        Of N rows, by a method whose budget is a number of rows.
    ids, group
        (N,) int64 each.

    Raises
    ------
    BudgetError
        As `Balance.limits`.
    InputError
        The arrays are not aligned.
    """
    n = len(selection.keep)
    if ids.shape != (n,) or group.shape != (n,):
        raise InputError(
            f"a balanced selection of {n} rows needs as many ids and groups; found {ids.shape} and"
            f" {group.shape}. Take all three from the same rows, in the same order."
        )
    if not n:
        return selection
    _, code, sizes = np.unique(group, return_inverse=True, return_counts=True)
    fewest, most = balance.limits(sizes.astype(np.int64), selection.kept)
    place = rules.rank_in_group(selection.score, ids, code, first=selection.keep)
    first = place < fewest[code]
    room = place < most[code]
    order = np.lexsort((ids, -selection.score.astype(np.float64), ~selection.keep, ~first))
    keep = np.zeros(n, np.bool_)
    keep[order[room[order]][: selection.kept]] = True
    return _explained(selection, keep, room)


def _explained(selection: Selection, keep: BoolArray, room: BoolArray) -> Selection:
    reasons = selection.reasons + REASONS
    added, way, full = (np.uint8(len(selection.reasons) + i) for i in range(3))
    reason = selection.reason.copy()
    reason[keep & ~selection.keep] = added
    reason[~keep & selection.keep] = way
    reason[~keep & selection.keep & ~room] = full
    rival = selection.rival.copy()
    rival[keep] = -1
    rival[(rival >= 0) & ~keep[rival]] = -1
    weight = np.where(keep & selection.keep, selection.weight, keep.astype(np.float32))
    return replace(
        selection,
        keep=keep,
        reason=reason,
        reasons=reasons,
        rival=rival,
        weight=weight.astype(np.float32),
    )
