"""Any method inside each stratum, so that small domains survive a budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import InputError
from .contract import IntArray, Pruner, Selection, Signals


def stratified(pruner: Pruner, signals: Signals, strata: IntArray, *, seed: int) -> Selection:
    """Apply a method to the rows of each stratum on its own and put the results together.

    Each stratum meets the method's budget by itself. Scores are those of the method inside the
    stratum: where its score depends on the other rows, scores of two strata do not compare.

    Parameters
    ----------
    pruner
        Any method.
    signals
        N rows, in any order.
    strata
        (N,) int64, the code of each row's stratum. For a method about tokens all tokens of a
        sample stand in one stratum.
    seed
        As for the method.

    Raises
    ------
    InputError
        `strata` is not (N,) or a sample stands in two strata; or what the method raises.
    """
    strata = np.asarray(strata)
    if strata.shape != (signals.n,):
        raise InputError(
            f"`strata` must have one code for each of {signals.n} rows; found shape"
            f" {strata.shape}. Give the rows and their strata in the same order."
        )
    # A method over the whole table may look at samples as well.
    for name in sorted({pruner.group or "sample", "sample"} & pruner.needs & set(signals)):
        _check_groups(name, signals[name], strata, signals["id"])
    if not signals.n:
        return pruner(signals, seed=seed)
    order = np.argsort(strata, kind="stable")
    reasons: list[str] = []
    parts: list[Selection] = []
    for rows in np.split(order, np.flatnonzero(np.diff(strata[order])) + 1):
        part = pruner(signals.take(rows), seed=seed)
        reasons += [name for name in part.reasons if name not in reasons]
        code = np.array([reasons.index(name) for name in part.reasons], np.uint8)
        rival = np.where(part.rival >= 0, rows[part.rival], -1)
        parts.append(replace(part, reason=code[part.reason], rival=rival))
    back = np.argsort(order)
    return Selection(
        keep=np.concatenate([part.keep for part in parts])[back],
        score=np.concatenate([part.score for part in parts])[back],
        reason=np.concatenate([part.reason for part in parts])[back],
        reasons=tuple(reasons),
        threshold=np.concatenate([part.threshold for part in parts])[back],
        rival=np.concatenate([part.rival for part in parts])[back],
        weight=np.concatenate([part.weight for part in parts])[back],
    )


def _check_groups(name: str, group: IntArray, strata: IntArray, ids: IntArray) -> None:
    order = np.argsort(group, kind="stable")
    crossing = (np.diff(group[order]) == 0) & (np.diff(strata[order]) != 0)
    if crossing.any():
        first, second = order[np.flatnonzero(crossing)[0] :][:2]
        raise InputError(
            f"a {name} must stand in one stratum; row {ids[first]} of {name} {group[first]} is in"
            f" stratum {strata[first]} and row {ids[second]} in {strata[second]}."
            f" Give every row of a {name} the same code."
        )
