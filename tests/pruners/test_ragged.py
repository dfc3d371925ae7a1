"""Groups of rows against loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.pruners import ragged


def test_ids_of_one_sample_ascend_with_position():
    sample = np.repeat(np.array([5, 2**62 - 1], np.int64), 4)
    ids = ragged.token_ids(sample, np.tile(np.arange(4), 2))
    assert (np.diff(ids.reshape(2, 4)) == 1).all()
    assert (ids >= 0).all()
    assert len(set(ids.tolist())) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), unique=True, max_size=30))
def test_groups_against_loops(rows):
    group = np.array([g for g, _ in rows], np.int64)
    place = np.array([p for _, p in rows], np.int64)
    values = np.sin(np.arange(len(rows)))
    run = ragged.by_group(group, place)
    assert [(group[r], place[r]) for r in run.order] == sorted(rows)
    mean, stretched = run.mean(values[run.order]), np.zeros(len(rows))
    stretched[run.order] = run.unit_range(values[run.order])
    for number, name in enumerate(run.groups):
        mine = values[group == name]
        assert run.sizes[number] == len(mine)
        assert mean[number] == pytest.approx(mine.mean())
        expected = (mine - mine.min()) / np.ptp(mine) if len(mine) > 1 else [0.5]
        np.testing.assert_allclose(stretched[group == name], expected)


@pytest.mark.parametrize(("span", "expected"), [(2e-6, [0.0, 1.0]), (5e-7, [0.5, 0.5])])
def test_range_of_rounding_is_flat(span, expected):
    run = ragged.by_group(np.zeros(2, np.int64), np.arange(2))
    np.testing.assert_allclose(run.unit_range(np.array([1.0, 1.0 + span])), expected)


def test_neighbours():
    group = np.array([1, 1, 1, 1, 2, 2])
    position = np.array([4, 5, 6, 8, 9, 10])
    turn = np.array([0, 0, 1, 1, 1, 1])
    run = ragged.by_group(group, position)
    before, after = ragged.neighbours(np.arange(1.0, 7.0), run, turn, position, outside=-1.0)
    assert before.tolist() == [-1, 1, -1, -1, -1, 5]
    assert after.tolist() == [2, -1, -1, -1, 6, -1]
