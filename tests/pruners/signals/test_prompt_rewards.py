"""Rewards against plain Python, by hand, and at the borders: ties, certainty, no rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.prompts.tables import REWARDS
from prunery.pruners.signals.prompt_rewards import LABELLED, accuracy, correct, influence, rewards


def answers(seed, prompts=4, rows=5, classes=3, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (prompts + 1, rows, classes))
    logp = (logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))).astype(np.float32)
    return logp[:-1], rng.integers(0, classes, rows), logp[-1]


def plain(logprobs, labels, empty):
    """One prompt's rewards, number by number."""
    made = dict.fromkeys(REWARDS, 0.0)
    for row, gold, base in zip(logprobs.tolist(), labels.tolist(), empty.tolist(), strict=True):
        p = [math.exp(x) for x in row]
        margin = p[gold] - max(x for code, x in enumerate(p) if code != gold)
        made["log_likelihood"] += row[gold]
        made["gap"] += (200 if margin > 0 else 180) * margin
        made["negative_entropy"] += sum(a * x for a, x in zip(p, row, strict=True))
        made["kl"] += sum(a * (x - y) for a, x, y in zip(p, row, base, strict=True))
        made["double_softmax"] += p[gold] - math.log(sum(math.exp(a) for a in p))
    return {name: value / len(labels) for name, value in made.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(2, 5))
def test_every_reward_is_the_plain_loop(seed, rows, classes):
    logprobs, labels, empty = answers(seed, 3, rows, classes)
    found = rewards(logprobs, labels, empty)
    assert tuple(found) == REWARDS
    for prompt in range(3):
        for name, value in plain(logprobs[prompt], labels, empty).items():
            assert found[name].dtype == np.float64
            assert found[name][prompt] == pytest.approx(value, abs=1e-9), name


def test_by_hand():
    logprobs = np.log([[[0.75, 0.25], [0.75, 0.25]]])
    empty = np.log([[0.5, 0.5], [0.5, 0.5]])
    found = rewards(logprobs, np.array([0, 1]), empty)
    assert found["log_likelihood"][0] == pytest.approx((math.log(0.75) + math.log(0.25)) / 2)
    assert found["gap"][0] == pytest.approx((200 * 0.5 - 180 * 0.5) / 2)
    entropy = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert found["negative_entropy"][0] == pytest.approx(entropy)
    assert found["kl"][0] == pytest.approx(entropy + math.log(2))
    normaliser = math.log(math.exp(0.75) + math.exp(0.25))
    assert found["double_softmax"][0] == pytest.approx(0.5 - normaliser)
    # Of the empty prompt: log 0.5 and no margin; the divergence stays as it is.
    moved = influence(logprobs, np.array([0, 1]), empty)
    assert moved["log_likelihood"][0] == pytest.approx(found["log_likelihood"][0] + math.log(2))
    assert moved["gap"][0] == pytest.approx(5.0)
    assert moved["kl"][0] == found["kl"][0]


def test_the_empty_prompt_has_no_influence_at_all():
    """Exactly 0 beside any other prompts, so that a word without effect is a tie with it."""
    for seed in range(20):
        logprobs, labels, empty = answers(seed, prompts=50, rows=33)
        logprobs[17] = empty
        for name, value in influence(logprobs, labels, empty).items():
            assert value[17] == 0.0, name


def test_a_prompt_s_rewards_do_not_depend_on_its_neighbours():
    logprobs, labels, empty = answers(3, prompts=40, rows=37)
    whole = rewards(logprobs, labels, empty)
    for prompt in (0, 13, 39):
        alone = rewards(logprobs[prompt : prompt + 1], labels, empty)
        assert all(alone[name][0] == whole[name][prompt] for name in REWARDS)


def test_which_rewards_read_the_labels():
    logprobs, labels, empty = answers(0)
    one, other = rewards(logprobs, labels, empty), rewards(logprobs, (labels + 1) % 3, empty)
    assert {name for name in REWARDS if not np.array_equal(one[name], other[name])} == LABELLED


def test_a_tie_is_worth_nothing_to_the_gap():
    logprobs = np.log([[[0.4, 0.4, 0.2]]])
    assert rewards(logprobs, np.array([0]), logprobs[0])["gap"][0] == 0.0
    assert rewards(logprobs, np.array([1]), logprobs[0])["gap"][0] == 0.0


def test_a_tie_is_right_only_for_the_smallest_code():
    logprobs = np.log([[[0.4, 0.4, 0.2]] * 3])
    labels = np.array([0, 1, 2])
    assert correct(logprobs, labels).tolist() == [[True, False, False]]
    assert accuracy(logprobs, labels).tolist() == [pytest.approx(1 / 3)]


def test_certainty_is_no_nan():
    with np.errstate(divide="ignore"):
        logprobs = np.log([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])
    found = rewards(logprobs, np.array([0]), np.log([[0.5, 0.5]]))
    assert found["negative_entropy"].tolist() == [0.0, 0.0, pytest.approx(-math.log(2))]
    assert found["kl"].tolist() == [pytest.approx(math.log(2))] * 2 + [0.0]
    assert found["gap"].tolist() == [200.0, -180.0, 0.0]
    assert found["log_likelihood"].tolist()[:2] == [0.0, -math.inf]
    # An empty prompt that rules a class out: infinitely far from one that does not.
    assert rewards(logprobs, np.array([0]), logprobs[0])["kl"].tolist() == [0.0, math.inf, math.inf]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y, e: (p[:, :, :1], y, e[:, :1]), "1 classes"),
        (lambda p, y, e: (p[:, :0], y[:0], e[:0]), "found 0 rows"),
        (lambda p, y, e: (p[:, :3], y, e), "expected"),
        (lambda p, y, e: (p, y[:3], e), "expected"),
        (lambda p, y, e: (p[0], y, e), "expected"),
        (lambda p, y, e: (p, np.where(y == y[2], 3, y), e), "is labelled 3"),
        (lambda p, y, e: (p, y - 3, e), "is labelled -"),
        (lambda p, y, e: (np.where(p == p[1, 2, 0], np.nan, p), y, e), r"found nan at \(1, 2, 0\)"),
        (lambda p, y, e: (np.exp(p), y, e), "up to 0"),
        (lambda p, y, e: (p, y, np.exp(e)), "of the empty prompt"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        rewards(*change(*answers(1)))


def test_no_prompts_and_no_rows():
    logprobs, labels, empty = answers(1)
    assert all(len(value) == 0 for value in rewards(logprobs[:0], labels, empty).values())
    with pytest.raises(InputError, match="at least one row"):
        accuracy(logprobs[:, :0], labels[:0])
    with pytest.raises(InputError, match="expected"):
        accuracy(logprobs, labels[:2])
