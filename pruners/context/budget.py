"""A token budget over the kept sentences of one question."""

from __future__ import annotations

import numpy as np

from ...errors import BudgetError
from ..contract import BoolArray, FloatArray, IntArray
from ..rules import best_first


def fit_tokens(
    keep: BoolArray,
    score: FloatArray,
    ids: IntArray,
    tokens: IntArray,
    passage: IntArray,
    limit: int,
    *,
    forced: BoolArray,
    title: BoolArray,
) -> BoolArray:
    """Drop kept sentences of one question until their tokens are at most `limit`.

    Greedy by score, ties to the smaller id; a sentence that does not fit is passed over and a
    shorter one after it may still enter. `forced` rows stay, and are paid first. A kept title
    costs its tokens once, together with the first sentence kept of its passage, and goes with
    the last; a title in a passage where nothing else was kept is a row like the others.

    All arrays (N,); returns (N,) bool, a subset of `keep`.

    Raises
    ------
    BudgetError
        The forced rows alone exceed the limit.
    """
    out = np.zeros(len(keep), np.bool_)
    bodies = np.unique(passage[keep & ~title])
    follows = keep & title & ~forced & np.isin(passage, bodies)
    unpaid = {int(p): row for p, row in zip(passage[follows], np.flatnonzero(follows), strict=True)}
    left = limit

    def enter(row: int) -> None:
        nonlocal left
        out[row] = True
        left -= int(tokens[row])
        head = unpaid.pop(int(passage[row]), None) if not title[row] else None
        if head is not None:
            out[head] = True
            left -= int(tokens[head])

    for row in np.flatnonzero(keep & forced):
        enter(int(row))
    if left < 0:
        raise BudgetError(
            f"protected sentences and their titles take {limit - left} tokens, more than"
            f" max_tokens={limit}. Raise max_tokens or narrow `protect`."
        )
    for row in best_first(score, ids):
        if not keep[row] or forced[row] or follows[row]:
            continue
        head = unpaid.get(int(passage[row])) if not title[row] else None
        if int(tokens[row]) + (int(tokens[head]) if head is not None else 0) <= left:
            enter(int(row))
    return out
