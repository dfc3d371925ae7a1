"""ClaPS and its control: golden cases, ties, and the size of the control."""

import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.prompt.claps import Claps
from prunery.pruners.prompt.random_prompts import RandomPrompts


def words(influence, ids=None):
    ids = np.arange(len(influence)) if ids is None else np.array(ids)
    return Signals({"id": ids, "prompt_influence": np.array(influence, np.float32)})


def test_golden():
    """ceil(0.4 * 4) = 2 of 0.5, -1, 0.75, 0.25."""
    selection = Claps(keep=0.4)(words([0.5, -1.0, 0.75, 0.25]), seed=0)
    assert selection.keep.tolist() == [True, False, True, False]
    assert selection.score.tolist() == [0.5, -1.0, 0.75, 0.25]
    assert selection.reason_names() == [
        "influential",
        "less_influential",
        "influential",
        "less_influential",
    ]
    assert selection.threshold.tolist() == [0.5] * 4


def test_ties_go_to_the_smaller_id_and_never_to_nobody():
    selection = Claps(keep=0.25)(words([0.5] * 5, ids=[9, 3, 7, 1, 5]), seed=0)
    assert selection.keep.tolist() == [False, True, False, True, False]


def test_negative_influence_is_kept_where_the_budget_asks_for_it():
    selection = Claps(keep=1.0)(words([-1.0, -2.0]), seed=0)
    assert selection.keep.all()


@pytest.mark.parametrize("n", [0, 1, 9, 10, 187, 1867])
def test_the_control_is_of_exactly_the_same_size(n):
    signals = words(np.random.default_rng(0).normal(size=n))
    kept = Claps()(signals, seed=0).kept
    assert RandomPrompts()(signals, seed=1).kept == kept == math.ceil(n / 10)


def test_the_control_draws_and_does_not_look():
    signals = words(np.arange(200))
    overlaps = []
    for seed in range(200):
        mask = RandomPrompts()(signals, seed=seed).keep
        overlaps.append((mask & Claps()(signals, seed=seed).keep).sum())
    # 20 of 200 drawn twice have 2 in common on average.
    assert 1.7 < np.mean(overlaps) < 2.3


@pytest.mark.parametrize("method", [Claps, RandomPrompts])
def test_a_fraction_is_wanted(method):
    with pytest.raises(InputError, match="keep"):
        method(keep=math.nan)
