"""CCS: by hand, against the published loop over strata, and where that loop loses rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.sample.ccs import Ccs, strata_of
from prunery.pruners.strata import stratified


def rows(difficulty, ids=None):
    ids = np.arange(len(difficulty)) if ids is None else ids
    return Signals({"id": ids, "difficulty": np.asarray(difficulty, np.float32)})


def test_golden():
    # The hardest of ten, 99, is cut. Strata of width 3 from 0 to 9: {0 .. 0.5}, {4}, {8, 9}.
    difficulty = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 4.0, 8.0, 9.0, 99.0]
    signals = rows(difficulty)
    drawn = rules.uniform(1, signals["id"])
    first = int(np.argmax(drawn[:6]))
    second = int(np.argsort(-drawn[:6])[1])
    high = 7 + int(np.argmax(drawn[7:9]))
    three = Ccs(keep=0.3, strata=3)(signals, seed=1)
    assert np.flatnonzero(three.keep).tolist() == [first, 6, high]
    five = Ccs(keep=0.5, strata=3)(signals, seed=1)
    assert np.flatnonzero(five.keep).tolist() == sorted([first, second, 6, 7, 8])
    assert five.score[[first, second, 6]].tolist() == [0.0, -1.0, 0.0]
    assert five.score[9] == -6.0
    assert five.reason_names()[9] == "cut_as_hardest"
    nine = Ccs(keep=0.9, strata=3)(signals, seed=1)
    assert nine.keep.tolist() == [True] * 9 + [False]
    assert Ccs(keep=1.0, strata=3)(signals, seed=1).reason_names()[9] == "refilled"


def test_strata_are_equally_wide_and_hold_both_ends():
    assert strata_of(np.array([0, 1, 2, 3, 4, 10], np.float32), 5).tolist() == [0, 0, 1, 1, 2, 4]
    assert strata_of(np.array([-4, -3, -2, -1], np.float32), 3).tolist() == [0, 1, 2, 2]
    # Borders differ where widths are of ranks, not of values.
    assert strata_of(np.array([0, 0, 0, 0, 1], np.float32), 2).tolist() == [0, 0, 0, 0, 1]
    assert strata_of(np.array([7, 7], np.float32), 9).tolist() == [0, 0]
    extremes = np.array([-3e38, 0, 3e38], np.float32)
    assert strata_of(extremes, 2).tolist() == [0, 1, 1]


def published_shares(sizes, count):
    """The loop of the paper's code: strata from the smallest up, equal parts of what is left."""
    shares, left = [0] * len(sizes), count
    for turn, stratum in enumerate(sorted(range(len(sizes)), key=lambda s: sizes[s])):
        shares[stratum] = min(sizes[stratum], left // (len(sizes) - turn))
        left -= shares[stratum]
    return shares


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 120), keep=st.floats(0.0, 1.0))
def test_shares_are_the_published_ones_to_one_row(seed, n, keep):
    difficulty = np.random.default_rng(seed).exponential(size=n).astype(np.float32)
    selection = Ccs(keep=keep, cutoff=0.0, strata=7)(rows(difficulty), seed=seed)
    stratum = strata_of(difficulty, 7)
    sizes = np.bincount(stratum, minlength=7)
    ours = np.bincount(stratum[selection.keep], minlength=7)
    shares = np.array(published_shares(sizes.tolist(), rules.count_of(n, keep)))
    assert ours.sum() == shares.sum()
    assert np.abs(ours - shares).max() <= 1


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -2.0])
def test_constant_difficulty_loses_no_row(value):
    for keep in (0.0, 0.3, 0.55, 1.0):
        selection = Ccs(keep=keep)(rows([value] * 20), seed=0)
        assert selection.kept == math.ceil(round(20 * keep, 9))


def test_negative_difficulty_keeps_its_top_row():
    difficulty = np.linspace(-9, -1, 50)
    selection = Ccs(keep=0.5, cutoff=0.0, strata=25)(rows(difficulty), seed=0)
    assert selection.kept == 25
    everything = Ccs(keep=1.0, cutoff=0.0)(rows(difficulty), seed=0)
    assert everything.keep.all()
    # The highest row is alone in its stratum and first in its draw.
    lone = Ccs(keep=0.04, cutoff=0.0, strata=2)(rows([-9.0] * 49 + [-1.0]), seed=0)
    assert lone.keep[49]


def test_one_row_and_none():
    assert Ccs(keep=0.1)(rows([5.0]), seed=0).keep.tolist() == [True]
    assert Ccs(keep=0.1, cutoff=1.0)(rows([5.0]), seed=0).keep.tolist() == [True]
    assert Ccs(keep=0.0)(rows([5.0]), seed=0).kept == 0
    assert Ccs()(rows([]), seed=0).kept == 0


def test_cut_rows_return_only_after_all_others_and_easiest_first():
    difficulty = np.arange(20)
    for count in range(21):
        keep = np.flatnonzero(Ccs(keep=count / 20, cutoff=0.3)(rows(difficulty), seed=2).keep)
        returned = keep[keep >= 14]
        assert returned.tolist() == list(range(14, max(count, 14)))


def test_of_equal_rows_the_larger_ids_are_cut():
    ids = np.array([5, 1, 9, 3])
    selection = Ccs(keep=0.5, cutoff=0.5)(rows([1.0] * 4, ids), seed=0)
    assert selection.keep.tolist() == [False, True, False, True]


def test_inside_each_class_every_class_has_its_own_count():
    sizes = [31, 10, 7]
    label = np.repeat([0, 1, 2], sizes)
    difficulty = np.random.default_rng(0).normal(size=48)
    selection = stratified(Ccs(keep=0.25), rows(difficulty), label, seed=0)
    assert np.bincount(label[selection.keep]).tolist() == [8, 3, 2]


def test_signals_are_left_as_they_are():
    signals = rows([3.0, 1.0, 2.0])
    Ccs()(signals, seed=0)
    assert signals["difficulty"].tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("options", [{"cutoff": 1.1}, {"cutoff": math.nan}, {"strata": 0}])
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Ccs(**options)
