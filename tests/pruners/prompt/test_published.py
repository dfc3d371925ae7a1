"""Each quirk of the published code, and where ours differs."""

import math

import numpy as np
import pytest

from prunery.pruners.contract import Signals
from prunery.pruners.prompt.claps import Claps
from prunery.pruners.prompt.published import (
    published_best,
    published_choice,
    published_control_size,
    published_crossover,
    published_gap,
    published_negative_entropy,
    published_reward,
    published_rule,
)
from prunery.pruners.signals.prompt_rewards import rewards


def ours(score, keep=0.1):
    ids = np.arange(len(score))
    return Claps(keep=keep)(Signals({"id": ids, "prompt_influence": score}), seed=0).keep


def test_the_rule_is_strictly_above_the_percentile():
    score = np.random.default_rng(0).normal(size=1867).astype(np.float32)
    kept = published_rule(score)
    place = 0.9 * 1866  # linear interpolation between the values beside this place
    low, high = np.sort(score)[[math.floor(place), math.ceil(place)]]
    border = low + (high - low) * (place - math.floor(place))
    assert np.array_equal(kept, score > border)
    assert kept.sum() == 187 == ours(score).sum()
    assert np.array_equal(kept, ours(score))
    assert published_rule(np.zeros(0)).tolist() == []


def test_the_rule_keeps_nothing_of_ties():
    score = np.full(100, 0.25, np.float32)
    assert published_rule(score).sum() == 0
    assert ours(score).sum() == 10
    # Ties over the border: 15 best words are all lost; ours takes 10 of them.
    score[:15] = 1.0
    assert published_rule(score).sum() == 0
    assert ours(score).tolist() == [True] * 10 + [False] * 90


def test_the_control_is_one_smaller():
    assert published_control_size(1867) == 186
    assert math.ceil(1867 / 10) == 187
    assert published_control_size(2000) == 200  # and equal where it is whole


def test_the_gap_takes_a_tie_for_right():
    p = np.array([[[0.5, 0.5]]])
    assert published_gap(p, np.array([1])).tolist() == [300.0]
    assert rewards(np.log(p), np.array([1]), np.log(p[0]))["gap"].tolist() == [0.0]
    # Three classes, all tied with the label but one: the rest is what remains.
    p = np.array([[[0.4, 0.4, 0.2]]])
    assert published_gap(p, np.array([0]))[0] == pytest.approx(40.0)
    assert rewards(np.log(p), np.array([0]), np.log(p[0]))["gap"][0] == 0.0


def test_without_ties_the_gaps_agree():
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(4), (6, 9))
    labels = rng.integers(0, 4, 9)
    np.testing.assert_allclose(
        published_gap(p, labels), rewards(np.log(p), labels, np.log(p[0]))["gap"], atol=1e-9
    )


def test_the_entropy_is_nan_at_certainty():
    p = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    assert np.isnan(published_negative_entropy(p)).tolist() == [True]
    with np.errstate(divide="ignore"):
        found = rewards(np.log(p), np.array([0, 0]), np.log([[0.5, 0.5]] * 2))
    assert found["negative_entropy"][0] == pytest.approx(-math.log(2) / 2)


def test_the_entropy_is_a_sum_over_rows_and_ours_a_mean():
    p = np.random.default_rng(2).dirichlet(np.ones(3), (5, 8))
    mine = rewards(np.log(p), np.zeros(8, int), np.log(p[0]))["negative_entropy"]
    np.testing.assert_allclose(published_negative_entropy(p), 8 * mine)


def test_the_reward_is_a_softmax_of_a_softmax():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(3), (7, 5))
    labels = rng.integers(0, 3, 5)
    expected = []
    for prompt in p:
        logged = [
            row[gold] - math.log(sum(math.exp(x) for x in row))
            for row, gold in zip(prompt, labels, strict=True)
        ]
        expected.append(sum(logged) / 5)
    found = published_reward(p, labels)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(found, rewards(np.log(p), labels, np.log(p[0]))["double_softmax"])
    with np.errstate(divide="ignore"):
        certain = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert published_reward(certain, np.array([0])).tolist() == [
        pytest.approx(1 - math.log(math.e + 1)),
        pytest.approx(-math.log(math.e + 1)),
    ]


def test_the_reward_prefers_another_prompt_than_the_log_likelihood():
    """One row hopelessly wrong: nats count it, squeezed ones hardly do."""
    steady = [[0.6, 0.4]] * 4
    daring = [[0.99, 0.01]] * 3 + [[0.001, 0.999]]
    p, labels = np.array([steady, daring]), np.zeros(4, int)
    mine = rewards(np.log(p), labels, np.log(p[0]))["log_likelihood"]
    assert mine[0] > mine[1]
    assert published_reward(p, labels)[0] < published_reward(p, labels)[1]


def test_the_crossover_mixes_nothing():
    assert published_crossover((1, 2), (3, 4), 0.2) == (1, 2)
    assert published_crossover((1, 2), (3, 4), 0.7) == (3, 4)


def test_validation_takes_the_last_maximum():
    scores = np.array([0.5, 0.9, 0.1, 0.9])
    assert published_choice(scores) == 3
    assert int(np.argmax(scores)) == 1


def test_the_noted_best_is_read_from_a_reordered_pool():
    pool = [(0,), (1,), (2,), (3,)]
    # The best stands at place 1; after sorting, place 1 holds the second best: (3,).
    assert published_best(pool, np.array([0.1, 0.9, 0.2, 0.8]), survivors=2) == 3
    # The best stood beyond the survivors: a child without a reward is noted.
    assert published_best(pool, np.array([0.1, 0.2, 0.3, 0.9]), survivors=2) == -1
    # Only a best that stands first by chance is found.
    assert published_best(pool, np.array([0.9, 0.2, 0.3, 0.1]), survivors=2) == 0
