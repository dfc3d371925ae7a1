"""Budgets over layers: exact totals, legal counts, and the formulas against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import BudgetError, InputError
from prunery.pipelines.compression.budgets import (
    CFSP_STEEPNESS,
    Units,
    apportion,
    best_groups,
    by_cosine,
    by_importance,
    equal_widths,
)


def units(total, cost, step=None, low=None):
    n = len(total)
    return Units(
        np.array(total, np.int64),
        np.array(cost, np.int64),
        np.array(step or [1] * n, np.int64),
        np.array(low or [1] * n, np.int64),
        tuple(f"part {i}" for i in range(n)),
    )


part = st.tuples(st.integers(1, 200), st.integers(1, 50), st.integers(1, 7), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(part, min_size=1, max_size=9), st.floats(0.02, 1))
def test_counts_are_legal_and_spend_the_budget_to_within_one_step(rows, density):
    total, cost, step, wish = (list(column) for column in zip(*rows, strict=True))
    where = units(total, cost, step)
    target = math.ceil(where.parameters * density)
    least = sum(min(t, s) * c for t, s, c in zip(total, step, cost, strict=True))
    if least > target:
        with pytest.raises(BudgetError, match="nearest sparsity"):
            apportion(np.array(wish), where, target)
        return
    keep = apportion(np.array(wish), where, target)
    left = target - sum(int(k) * c for k, c in zip(keep, cost, strict=True))
    assert left >= 0
    for k, t, c, s in zip(keep, total, cost, step, strict=True):
        assert 1 <= k <= t
        assert k % s == 0 or k == t
        if k < t:  # nothing more would have fitted
            assert (min(t, (k // s + 1) * s) - k) * c > left


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.floats(0.05, 1), st.data())
def test_single_weights_meet_a_budget_exactly(total, density, data):
    where = units(total, [1] * len(total))
    wish = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(total), max_size=len(total))))
    target = max(len(total), math.ceil(sum(total) * density))
    assert apportion(wish, where, target).sum() == target


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=10, unique=True), st.floats(0.1, 0.9))
def test_higher_densities_keep_more_and_order_does_not_matter(wishes, density):
    n = len(wishes)
    wish = np.array(wishes) / 1000
    where = units([997] * n, [3] * n)
    target = math.ceil(where.parameters * density)
    keep = apportion(wish, where, target)
    order = np.argsort(wish)
    assert (np.diff(keep[order]) >= 0).all()
    shuffled = np.random.default_rng(0).permutation(n)
    again = apportion(wish[shuffled], where, target)
    # Parts whose remainders tie may swap one unit.
    assert np.abs(again - keep[shuffled]).max() <= 1
    assert again.sum() == keep.sum()


def test_a_budget_below_what_must_stay_names_the_part_and_the_nearest():
    with pytest.raises(BudgetError, match=r"part 1: 128 of 256 units.*nearest sparsity is 0\.5"):
        apportion(np.array([0.1, 0.1]), units([256, 256], [1, 2], [128, 128]), 100)


def test_equal_widths_round_the_dear_parts_and_mend_it_with_the_cheap_ones():
    # Two layers: 2 groups of 600, 100 neurons of 10; a fifth is to go.
    where = units([2, 100, 2, 100], [600, 10, 600, 10])
    kinds = ["attention", "mlp"] * 2
    keep = equal_widths(0.8, where, kinds, math.ceil(where.parameters * 0.8))
    # Heads cannot give 0.4 of a group: all stay, and neurons make up for it.
    assert keep.tolist() == [2, 56, 2, 56]
    assert (keep * where.cost).sum() == 0.8 * where.parameters


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 300), st.integers(1, 8), st.floats(0, 0.9)
)
def test_equal_widths_are_equal_and_miss_the_budget_by_at_most_half_a_step_a_layer(
    layers, heads, neurons, step, s
):
    where = units([heads, neurons] * layers, [90, 7] * layers, [1, min(step, neurons)] * layers)
    target = math.ceil(where.parameters * (1 - s))
    keep = equal_widths(1 - s, where, ["a", "m"] * layers, target).reshape(layers, 2)
    assert (keep == keep[0]).all()
    assert 1 <= keep[0, 0] <= heads
    assert 1 <= keep[0, 1] <= neurons
    # Half a step a layer (and the target's own rounding), unless heads or neurons are at their end.
    spent = int((keep * [90, 7]).sum())
    if 1 < keep[0, 0] < heads and min(step, neurons) < keep[0, 1] < neurons:
        assert 2 * abs(spent - target) <= (7 * min(step, neurons) + 2) * layers


def test_cfsp_densities_are_the_published_curve_where_it_fits():
    angle = np.array([0.10, 0.12, 0.11, 0.3])
    weight = np.array([1.0, 1.0, 1.0, 1.0])
    made = by_importance(angle, weight, 0.5, 5.0)
    sigmoid = [1 / (1 + math.exp(-5.0 * (a - angle.mean()))) for a in angle]
    expected = [0.5 * one / (sum(sigmoid) / 4) for one in sigmoid]
    np.testing.assert_allclose(made, expected, rtol=1e-12)
    # The published constants: a sum over 128 rows of 2048 tokens, divided by 10^4.
    tokens = 128 * 2048
    np.testing.assert_allclose(
        by_importance(angle, weight, 0.5, CFSP_STEEPNESS)[0],
        by_importance(angle * tokens, weight, 0.5, 1 / 1e4)[0],
        rtol=1e-9,
    )


layers = st.lists(st.floats(0, 1), min_size=2, max_size=12)


@settings(max_examples=80, deadline=None)
@given(layers, st.floats(0.05, 0.98), st.floats(0, 60), st.integers(0, 9))
def test_densities_by_importance_keep_the_mean_stay_under_1_and_rise(values, density, steep, seed):
    importance = np.array(values)
    weight = np.random.default_rng(seed).integers(1, 9, len(values)).astype(float)
    made = by_importance(importance, weight, density, steep)
    assert np.average(made, weights=weight) == pytest.approx(density, abs=1e-9)
    assert (made >= 0).all()
    assert (made < 1).all()
    order = np.argsort(importance, kind="stable")
    assert (np.diff(made[order]) >= -1e-12).all()
    mixed = np.random.default_rng(seed).permutation(len(values))
    np.testing.assert_allclose(
        by_importance(importance[mixed], weight[mixed], density, steep), made[mixed], atol=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(layers, st.floats(0.05, 0.95), st.integers(0, 9))
def test_adapt_densities_keep_the_mean_and_fall_with_the_cosine(values, density, seed):
    cosine = np.array(values)
    weight = np.random.default_rng(seed).integers(1, 9, len(values)).astype(float)
    made = by_cosine(cosine, weight, density, 0.03)
    assert np.average(made, weights=weight) == pytest.approx(density, abs=1e-9)
    assert ((made >= 0.01 - 1e-12) & (made <= 1)).all()
    assert (np.diff(made[np.argsort(cosine, kind="stable")]) <= 1e-12).all()


def test_adapt_densities_by_hand():
    # Half of it in ten rounds of 0.05; importances 1, 0, -1 move each by 0.03 a round.
    made = by_cosine(np.array([0.1, 0.5, 0.9]), np.ones(3), 0.5, 0.03)
    np.testing.assert_allclose(made, [0.8, 0.5, 0.2], atol=1e-9)


def test_a_layer_without_a_finite_importance_is_named():
    with pytest.raises(InputError, match="layer 1"):
        by_importance(np.array([0.1, np.nan]), np.ones(2), 0.5, 1.0)
    with pytest.raises(InputError, match="layer 0"):
        by_cosine(np.array([np.inf, 0.1]), np.ones(2), 0.5, 0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 1))
def test_the_best_groups_of_all_parts_fill_the_budget(seed, density):
    rng = np.random.default_rng(seed)
    where = units([4, 30, 4, 30], [100, 9, 100, 9], low=[1, 2, 1, 2])
    of = np.repeat(np.arange(4), where.total)
    score = rng.integers(0, 20, len(of)).astype(float)  # with ties
    cost = where.cost[of]
    target = math.ceil(where.parameters * density)
    if target < int((where.low * where.cost).sum()):
        return
    kept = best_groups(score, cost, of, where, target)
    # By hand: floors first, then down the list until the budget is reached.
    taken = set()
    order = sorted(range(len(of)), key=lambda g: (-score[g], g))
    for p, floor in enumerate([1, 2, 1, 2]):
        taken |= set([g for g in order if of[g] == p][:floor])
    left = target - sum(cost[g] for g in taken)
    for g in order:
        if g in taken:
            continue
        if left <= 0:
            break
        taken.add(g)
        left -= cost[g]
    assert kept.tolist() == [sum(of[g] == p for g in taken) for p in range(4)]
    assert 0 <= int((kept * where.cost).sum()) - target < 100
