"""Successive halving: the schedule by hand, its cost, reuse of rows, and who goes on."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.prompts.halving import Rung, advance, queries, rows_of, schedule


def test_by_hand():
    assert schedule(100, 16, 4) == [(100, 4), (50, 8), (25, 16)]
    assert schedule(7, 16, 4) == [(7, 4), (4, 8), (2, 16)]  # halves are rounded up
    assert schedule(100, 16, 4, least=40) == [(100, 4), (50, 8), (40, 16)]
    assert schedule(100, 12, 4) == [(100, 4), (50, 8), (25, 12)]  # the last rung is all rows
    assert schedule(100, 16, 16) == schedule(100, 16, 99) == [Rung(100, 16)]


def test_rungs_that_drop_nobody_are_merged():
    assert schedule(100, 16, 4, least=100) == [(100, 16)]
    assert schedule(100, 16, 2, least=50) == [(100, 2), (50, 16)]
    assert schedule(1, 16, 4) == [(1, 16)]
    assert schedule(0, 16, 4) == [(0, 16)]
    assert schedule(5, 16, 4, least=9) == [(5, 16)]


@given(st.integers(0, 3000), st.integers(1, 64), st.integers(1, 70), st.integers(1, 300))
def test_what_every_schedule_keeps(candidates, shots, start, least):
    rungs = schedule(candidates, shots, start, least=least)
    assert rungs[0].candidates == candidates
    assert rungs[-1].shots == shots  # finalists have seen all rows
    assert rungs[-1].candidates >= min(candidates, least)
    for one, other in itertools.pairwise(rungs):
        assert one.shots < other.shots
        assert max(math.ceil(one.candidates / 2), min(least, candidates)) == other.candidates
        assert other.candidates < one.candidates


def full_rows(classes):
    return lambda shots: classes * shots


def test_four_eight_sixteen_costs_half():
    """1/4 + 1/8 + 1/8 of the words' queries, and the empty prompt on all rows."""
    rungs = schedule(2000, 16, 4)
    assert queries(rungs, full_rows(4)) == 2000 * 16 * 4 // 2 + 64
    assert queries(schedule(2000, 16, 16), full_rows(4)) == 2000 * 16 * 4 + 64
    for candidates in (37, 1867):
        share = (queries(schedule(candidates, 16, 4), full_rows(3)) - 48) / (candidates * 48)
        assert share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("counts", [(16, 16), (5, 16), (3, 9, 16), (16,)])
@pytest.mark.parametrize("start", [2, 4, 16])
def test_queries_are_those_of_asking_rung_by_rung(counts, start):
    """Counted pair by pair, also where classes have fewer rows than shots."""
    shot = np.concatenate([np.arange(count) for count in counts])
    np.random.default_rng(0).shuffle(shot)
    rungs = schedule(21, 16, start, least=4)
    asked, alive = set(), list(range(21))
    for rung in rungs:
        alive = alive[: rung.candidates]
        pairs = {(word, row) for word in alive for row in np.flatnonzero(shot < rung.shots)}
        asked |= pairs
    assert queries(rungs, lambda s: len(rows_of(shot, s))) == len(asked) + len(shot)


def test_rows_of_a_rung_are_those_not_seen_before():
    shot = np.array([0, 1, 2, 3, 0, 1, 2])
    assert rows_of(shot, 2).tolist() == [0, 1, 4, 5]
    assert rows_of(shot, 4, before=2).tolist() == [2, 3, 6]
    assert rows_of(shot, 1).dtype == np.int64


def test_ties_go_on_by_the_smaller_id():
    keep = advance(np.array([0.5, 0.5, 0.9, 0.5]), np.array([8, 2, 9, 4]), 2)
    assert keep.tolist() == [False, True, True, False]
    assert advance(np.zeros(0), np.zeros(0, np.int64), 3).tolist() == []
    assert advance(np.array([1.0, -np.inf]), np.array([1, 2]), 5).tolist() == [True, True]


def test_what_is_refused():
    with pytest.raises(InputError, match="candidate 1 holds NaN"):
        advance(np.array([0.5, np.nan]), np.array([1, 2]), 1)
    for arguments in [(-1, 16, 4, 1), (5, 0, 4, 1), (5, 16, 0, 1), (5, 16, 4, 0)]:
        candidates, shots, start, least = arguments
        with pytest.raises(InputError, match="at least"):
            schedule(candidates, shots, start, least=least)
