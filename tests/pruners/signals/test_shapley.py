"""KNN-Shapley against a hand-worked case and against Shapley's definition over all subsets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.signals.shapley import knn_shapley


def utility(nearest_first, agree, subset, k):
    inside = [a for row, a in zip(nearest_first, agree, strict=True) if row in subset]
    return sum(inside[:k]) / k


def brute_force(neighbours, agree, k, n):
    """Mean over validation rows of the weighted marginal gains over every subset."""
    values = np.zeros(n)
    for nearest, right in zip(neighbours, agree, strict=True):
        for row in range(n):
            others = [i for i in range(n) if i != row]
            for size in range(n):
                weight = 1 / (n * math.comb(n - 1, size))
                for subset in itertools.combinations(others, size):
                    gain = utility(nearest, right, {*subset, row}, k)
                    gain -= utility(nearest, right, set(subset), k)
                    values[row] += weight * gain
    return values / len(neighbours)


@st.composite
def games(draw, most=6):
    n = draw(st.integers(1, most))
    asked = draw(st.integers(1, 3))
    neighbours = np.array([draw(st.permutations(range(n))) for _ in range(asked)])
    bits = st.lists(st.booleans(), min_size=n, max_size=n)
    agree = np.array([draw(bits) for _ in range(asked)])
    return neighbours, agree, draw(st.integers(1, n + 2)), n


def test_golden():
    # k = 1, nearest first rows 2, 0, 1, right labels 1, 0, 1. s_3 = 1/3, s_2 = 1/3 - 1/2,
    # s_1 = s_2 + 1 = 5/6. They add up to 1, the whole set's accuracy.
    value = knn_shapley(np.array([[2, 0, 1]]), np.array([[True, False, True]]), 1, 3)
    np.testing.assert_allclose(value, [-1 / 6, 1 / 3, 5 / 6])


def test_golden_of_the_truncated_form():
    # k = 2, K* = 3 of 5: s_3 = 0, s_2 = (0 - 1) * 2/2 / 2, s_1 = s_2 + (1 - 0) / 2.
    value = knn_shapley(np.array([[4, 1, 0]]), np.array([[True, False, True]]), 2, 5)
    np.testing.assert_allclose(value, [0, -0.5, 0, 0, 0])


def test_golden_of_the_share_beyond():
    # The same with a quarter of the two other rows' labels right: s_3 = 1/3 - (1/3 - 1/5) / 4.
    last = 1 / 3 - (1 / 3 - 1 / 5) / 4
    asked = np.array([[4, 1, 0]]), np.array([[True, False, True]])
    value = knn_shapley(*asked, 2, 5, beyond=np.array([0.25]))
    np.testing.assert_allclose(value, [last, last - 0.5, 0, 0, last])


@settings(max_examples=60, deadline=None)
@given(games())
def test_it_is_shapleys_value_with_all_rows_given(game):
    neighbours, agree, k, n = game
    np.testing.assert_allclose(
        knn_shapley(neighbours, agree, k, n), brute_force(neighbours, agree, k, n), atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(games(most=40), st.integers(1, 40))
def test_values_add_up_to_the_accuracy_and_depth_bounds_the_error(game, depth):
    neighbours, agree, k, n = game
    exact = knn_shapley(neighbours, agree, k, n)
    accuracy = np.mean([a[:k].sum() / k for a in agree])
    assert exact.sum() == pytest.approx(accuracy)
    depth = min(max(depth, k), n)
    near = neighbours[:, :depth], agree[:, :depth]
    part = knn_shapley(*near, k, n)
    assert np.abs(part - exact).max() <= 1 / depth + 1e-12
    share = agree[:, depth:].mean(axis=1) if depth < n else np.zeros(len(agree))
    mended = knn_shapley(*near, k, n, beyond=share)
    assert np.abs(mended - exact).max() <= 1 / depth + 1e-12
    if depth == n or set(share) <= {0.0, 1.0}:  # nothing to guess about the rows beyond
        listed = np.isin(np.arange(n), near[0]) if len(agree) == 1 else slice(0)
        np.testing.assert_allclose(mended[listed], exact[listed], atol=1e-12)


def test_blocks_add_up():
    rng = np.random.default_rng(0)
    neighbours = np.stack([rng.permutation(50)[:20] for _ in range(9)])
    agree = rng.random((9, 20)) < 0.5
    whole = knn_shapley(neighbours, agree, 5, 50)
    parts = [
        knn_shapley(neighbours[s], agree[s], 5, 50) * len(agree[s])
        for s in (slice(0, 4), slice(4, 9))
    ]
    np.testing.assert_allclose(sum(parts) / 9, whole)


def test_leave_one_out_is_exact_with_all_others_given():
    # Two rows that value each other: each is the other's whole training set.
    value = knn_shapley(np.array([[1], [0]]), np.array([[True], [True]]), 1, 2, candidates=1)
    np.testing.assert_allclose(value, [0.5, 0.5])
    truncated = knn_shapley(np.array([[1], [0]]), np.array([[True], [True]]), 1, 2)
    assert truncated.tolist() == [0.0, 0.0]


def test_cleanlab_is_the_form_with_as_many_neighbours_as_k():
    valuation = pytest.importorskip("cleanlab.data_valuation", reason="cleanlab is not installed")
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((60, 5)), rng.integers(0, 3, 60)
    far = np.linalg.norm(features[:, None] - features, axis=2)
    np.fill_diagonal(far, np.inf)
    nearest = far.argsort(axis=1)[:, :7]
    value = knn_shapley(nearest, labels[nearest] == labels[:, None], 7, 60)
    theirs = valuation.data_shapley_knn(labels, features=features, metric="euclidean", k=7)
    np.testing.assert_allclose((1 + value) / 2, theirs, atol=1e-12)


def test_nothing_to_value_or_to_ask():
    none = np.zeros((0, 3), np.int64)
    assert knn_shapley(none, none.astype(bool), 2, 3).tolist() == [0.0, 0.0, 0.0]
    empty = np.zeros((4, 0), np.int64)
    assert knn_shapley(empty, empty.astype(bool), 2, 0).tolist() == []


@pytest.mark.parametrize(
    ("neighbours", "k", "n", "match"),
    [
        ([[0, 1]], 0, 3, "`k` must be at least 1"),
        ([[0, 1]], 3, 3, "K\\* must lie"),
        ([[0, 1]], 1, 1, "K\\* must lie"),
        ([[0, -1]], 1, 3, "positions in 0..2; found -1"),
        ([[0, 3]], 1, 3, "found 0 to 3"),
        ([0, 1], 1, 3, "must both be"),
    ],
)
def test_what_is_refused(neighbours, k, n, match):
    neighbours = np.array(neighbours)
    with pytest.raises(InputError, match=match):
        knn_shapley(neighbours, neighbours == 0, k, n)


@pytest.mark.parametrize("beyond", [[0.5, 0.5], [-0.1], [1.1], [np.nan]])
def test_shares_beyond_that_are_none(beyond):
    with pytest.raises(InputError, match="`beyond` must hold a share"):
        knn_shapley(np.array([[0]]), np.array([[True]]), 1, 3, beyond=np.array(beyond))
