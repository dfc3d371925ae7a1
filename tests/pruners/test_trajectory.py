import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.trajectory import (
    SHORT_RUN,
    by_run,
    deviation,
    epoch_mean,
    run_mean,
    window_mean,
    windows,
)


def test_epochs_of_the_first_run_come_first():
    trajectory = np.array([[1, 2, 3, 10, 20, 30]], np.float32)
    assert by_run("el2n", trajectory, 2).tolist() == [[[1, 2, 3], [10, 20, 30]]]
    assert epoch_mean(by_run("el2n", trajectory, 2)).tolist() == [[2.0, 20.0]]
    assert epoch_mean(by_run("el2n", trajectory, 3)).tolist() == [[1.5, 6.5, 25.0]]
    assert run_mean(np.array([[2.0, 20.0], [1.0, 2.0]])).tolist() == [11.0, 1.5]


@pytest.mark.parametrize(("width", "runs"), [(5, 2), (0, 1), (0, 3), (2, 3)])
def test_a_width_that_does_not_fit_the_runs(width, runs):
    with pytest.raises(InputError, match=rf"`margin`.*{runs} runs; found {width} values"):
        by_run("margin", np.zeros((4, width)), runs)


def test_windows_slide_by_one_epoch_oldest_first():
    trajectory = np.array([[[1, 2, 3, 4]]], np.float32)
    assert [part.tolist() for part in windows(trajectory, 3)] == [[[[1, 2, 3]]], [[[2, 3, 4]]]]
    assert [part.shape for part in windows(trajectory, 4)] == [(1, 1, 4)]
    assert [part.tolist() for part in windows(trajectory, 9)] == [[[[1, 2, 3, 4]]]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    runs=st.integers(1, 3),
    epochs=st.integers(1, 14),
    size=st.integers(2, 8),
)
def test_window_mean_against_plain_loops(rows, runs, epochs, size):
    trajectory = np.random.default_rng(epochs).random((rows, runs, epochs), np.float32)
    expected = np.zeros((rows, runs))
    for row in range(rows):
        for run in range(runs):
            line = trajectory[row, run].astype(np.float64)
            last = max(epochs - size, 0)
            parts = [line[start : start + size].std() for start in range(last + 1)]
            expected[row, run] = np.mean(parts)
    np.testing.assert_allclose(window_mean(trajectory, size, deviation), expected, atol=1e-12)


def test_a_row_has_the_same_bits_wherever_it_stands():
    trajectory = np.random.default_rng(0).random((9000, 1, 37), np.float32)
    order = np.random.default_rng(1).permutation(9000)
    for formula in (epoch_mean, lambda t: window_mean(t, 10, deviation)):
        assert np.array_equal(formula(trajectory)[order], formula(trajectory[order]))


def test_short_run():
    assert SHORT_RUN == 30
