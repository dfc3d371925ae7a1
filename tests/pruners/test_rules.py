"""Rules against brute force, and golden values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.pruners import rules

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -3.0]), min_size=0, max_size=40)


def brute_top(score, ids, count):
    order = sorted(range(len(score)), key=lambda i: (-score[i], ids[i]))
    keep = np.zeros(len(score), bool)
    keep[order[: max(count, 0)]] = True
    return keep


@given(scores, st.integers(0, 45), st.randoms())
@settings(max_examples=200, deadline=None)
def test_top_count_is_the_sorted_prefix(values, count, random):
    score = np.array(values, np.float32)
    ids = np.array(random.sample(range(1000), len(values)), np.int64)
    keep, border = rules.top_count(score, ids, count)
    assert np.array_equal(keep, brute_top(score, ids, count))
    if keep.any():
        assert border == score[keep].min()
    else:
        assert math.isnan(border)


@given(scores, st.randoms())
@settings(max_examples=100, deadline=None)
def test_rank_in_group_counts_better_rows(values, random):
    score = np.array(values, np.float32)
    n = len(values)
    ids = np.array(random.sample(range(1000), n), np.int64)
    group = np.array([random.choice([3, 8, 2**61]) for _ in range(n)], np.int64)
    rank = rules.rank_in_group(score, ids, group)
    for i in range(n):
        better = sum(
            group[j] == group[i] and (-score[j], ids[j]) < (-score[i], ids[i]) for j in range(n)
        )
        assert rank[i] == better


def test_count_of_is_immune_to_the_last_bit():
    assert 0.07 * 100 > 7  # why the rounding is there
    assert rules.count_of(100, 0.07) == 7
    assert rules.count_of(100, 0.0701) == 8
    assert rules.count_of(7, 0.0) == 0
    assert rules.count_of(7, 1.0) == 7


def test_top_fraction_by_group_golden():
    score = np.array([0.9, 0.1, 0.5, 0.2, 0.2, 0.8], np.float32)
    ids = np.array([1, 2, 3, 5, 4, 6], np.int64)
    group = np.array([7, 7, 7, 9, 9, 9], np.int64)
    # ceil(0.5 * 3) = 2 a group; the tie at 0.2 goes to id 4.
    keep = rules.top_fraction_by_group(score, ids, group, 0.5)
    assert keep.tolist() == [True, False, True, False, True, True]


def test_within_cost_never_overruns_and_uses_the_room():
    score = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    ids = np.arange(4, dtype=np.int64)
    cost = np.array([5, 6, 2, 3], np.int64)
    # 5 enters, 6 does not fit in the 5 left, 2 and 3 do.
    assert rules.within_cost(score, ids, cost, 10).tolist() == [True, False, True, True]
    eligible = np.array([False, True, True, True])
    masked = rules.within_cost(score, ids, cost, 10, eligible=eligible)
    assert masked.tolist() == [False, True, True, False]


def test_uniform_is_a_function_of_seed_and_id_alone():
    ids = np.arange(100_000, dtype=np.int64)
    draws = rules.uniform(1, ids)
    assert np.array_equal(draws[::-1], rules.uniform(1, ids[::-1]))
    assert draws.min() > 0
    assert draws.max() < 1
    # 5 sigma of the mean of n uniforms, and of one decile's count.
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * len(ids))
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 5 * math.sqrt(9_000)
    other = rules.uniform(2, ids)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 5 / math.sqrt(len(ids))


@pytest.mark.parametrize("block", [1, 3, 64])
def test_earlier_neighbour_against_brute_force(block):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 6)).astype(np.float32)
    vectors[10] = vectors[20]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = rng.permutation(50).astype(np.int64)
    best, where = rules.earlier_neighbour(vectors, ids, block=block)
    for i in range(50):
        earlier = [j for j in range(50) if ids[j] < ids[i]]
        if not earlier:
            assert (best[i], where[i]) == (-1, -1)
            continue
        expected = max(float(vectors[i] @ vectors[j]) for j in earlier)
        assert best[i] == pytest.approx(min(expected, 1.0), abs=1e-6)
        assert float(vectors[i] @ vectors[where[i]]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "fraction", "up", "down"),
    [(100, 0.55, 55, 55), (100, 0.29, 29, 29), (7, 0.5, 4, 3), (3, 1.0, 3, 3), (9, 0.0, 0, 0)],
)
def test_counts_are_exact(size, fraction, up, down):
    assert rules.count_of(size, fraction) == up
    assert rules.floor_of(size, fraction) == down
    sizes = np.array([size, 2, size])
    assert rules.counts_of(sizes, fraction).tolist()[::2] == [up, up]
    assert rules.counts_of(sizes, fraction, rounded="down").tolist()[::2] == [down, down]


def test_rank_puts_flagged_rows_first():
    score = np.array([5.0, 1.0, 3.0, 2.0, 9.0])
    first = np.array([False, True, False, True, False])
    group = np.array([0, 0, 0, 0, 1])
    rank = rules.rank_in_group(score, np.arange(5), group, first=first)
    assert rank.tolist() == [2, 1, 3, 0, 0]


@given(scores)
@settings(max_examples=100, deadline=None)
def test_places_against_counting(values):
    array = np.array(values, np.float32)
    smaller = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    assert rules.left_places(array).tolist() == smaller
    middle = [s + (e - 1) / 2 for s, e in zip(smaller, equal, strict=True)]
    last = len(values) - 1
    expected = [m / last for m in middle] if last > 0 else [0.5] * len(values)
    np.testing.assert_allclose(rules.mean_rank(array), expected)
