"""Successive halving: many words on few rows, the better half of them on twice as many.

Rows are reused: a word that goes on is asked only about the rows that it has not seen. With 4, 8
and 16 shots a class half of the queries of a full pass are left (1/4 + 1/8 + 1/8), and whoever is
judged in the end has seen all rows. Jamieson and Talwalkar 2016 (arXiv:1502.07943), with rows as
the resource.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ...pruners import rules
from ...pruners.contract import BoolArray, FloatArray, IntArray, check_count
from ...pruners.signals.prompt_rewards import FloatArray64


class Rung(NamedTuple):
    """So many candidates are known on the first `shots` shots of every class."""

    candidates: int
    shots: int


def schedule(candidates: int, shots: int, start: int, *, least: int = 1) -> list[Rung]:
    """The rungs from `start` shots a class to all `shots`, each with twice the shots before it.

    Candidates are halved, rounded up, between rungs, but never below `least`: the number that
    will be kept in the end, so that all of those have seen all rows. A rung that would drop
    nobody is merged into the next. `start` >= `shots` is one rung: no halving.

    Raises
    ------
    InputError
        A count is out of range.
    """
    check_count("candidates", candidates)
    check_count("shots", shots, low=1)
    check_count("start", start, low=1)
    check_count("least", least, low=1)
    now = min(start, shots)
    rungs = [Rung(candidates, now)]
    while now < shots:
        now = min(2 * now, shots)
        left = min(rungs[-1].candidates, max(-(-rungs[-1].candidates // 2), least))
        if left == rungs[-1].candidates:
            rungs.pop()
        rungs.append(Rung(left, now))
    return rungs


def rows_of(shot: IntArray, rung: int, before: int = 0) -> IntArray:
    """Places of the rows whose `shot` (N,) lies in [before, rung), in the order of the rows.

    `shot` is a row's place in its class, from 0; so the rows below any border are the same
    number of each class, where the classes have that many.
    """
    return np.flatnonzero((shot >= before) & (shot < rung)).astype(np.int64)


def queries(rungs: Sequence[Rung], rows: Callable[[int], int]) -> int:
    """(prompt, row) queries of a schedule, exactly, the empty prompt on all rows included.

    `rows(s)` is the number of rows in the first s shots of every class, such as
    `lambda s: len(rows_of(shot, s))`: classes may have fewer rows than shots.
    """
    total, before = rows(rungs[-1].shots), 0
    for rung in rungs:
        seen = rows(rung.shots)
        total += rung.candidates * (seen - before)
        before = seen
    return total


def advance(score: FloatArray | FloatArray64, ids: IntArray, keep: int) -> BoolArray:
    """Who goes on to the next rung: the `keep` highest scores, ties to the smaller id. (N,).

    Raises
    ------
    InputError
        A score is NaN.
    """
    missing = np.flatnonzero(np.isnan(score))
    if len(missing):
        raise InputError(f"scores must be numbers; candidate {missing[0]} holds NaN.")
    return rules.top_count(score, ids, keep)[0]
