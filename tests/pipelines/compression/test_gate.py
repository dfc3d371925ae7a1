import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.compression.gate import (
    Ratio,
    TaskScore,
    judge,
    kept_shares,
    perplexity_ratio,
    same_budget,
)

NAN = math.nan


def rows(count=40, gain=0.0, spread=0.5, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 50, count)
    dense = tokens * rng.uniform(2, 3, count)
    other = dense + tokens * (gain + spread * rng.standard_normal(count))
    return other, dense, tokens


def test_the_ratio_is_of_token_weighted_perplexities():
    other, dense, tokens = rows(gain=0.2)
    found = perplexity_ratio(other, dense, tokens, seed=0, resamples=50)
    want = math.exp(other.sum() / tokens.sum()) / math.exp(dense.sum() / tokens.sum())
    assert math.isclose(found.value, want, rel_tol=1e-12)
    assert found.low < found.value < found.high


def test_noise_is_that_of_a_ratio_estimate():
    other, dense, tokens = rows(count=400, spread=0.1)
    found = perplexity_ratio(other, dense, tokens, seed=0, resamples=2000)
    # linearised: residuals of a ratio of sums, times the ratio itself (delta method)
    mean = (other - dense).sum() / tokens.sum()
    residual = (other - dense) - mean * tokens
    want = found.value * math.sqrt((residual**2).sum()) / tokens.sum()
    assert math.isclose(found.noise, want, rel_tol=0.08)
    assert perplexity_ratio(other, dense, tokens, seed=0, resamples=2000) == found
    assert perplexity_ratio(other, dense, tokens, seed=1, resamples=2000) != found


def test_the_same_losses_have_no_noise():
    _, dense, tokens = rows()
    found = perplexity_ratio(dense, dense, tokens, seed=0, resamples=50)
    assert found == Ratio(1.0, 0.0, 1.0, 1.0)


def test_one_row_tells_no_noise():
    with pytest.raises(InputError, match="at least 2 evaluation rows"):
        perplexity_ratio(np.ones(1), np.ones(1), np.ones(1, int), seed=0, resamples=50)


def verdict(value, noise=0.0, tasks=None, tolerance=0.1):
    return judge(
        Ratio(value, noise, value, value), tasks or {}, tolerance=tolerance, task_tolerance=0.02
    )


@pytest.mark.parametrize(
    ("value", "noise", "accepted"),
    [
        (1.1, 0.0, True),
        (1.11, 0.0, False),
        (1.11, 0.2, True),  # cannot be told from the choice of rows
        (1.12, 0.05, False),  # the larger of the two, not their sum
        (0.8, 0.0, True),
        (NAN, 0.0, False),
        (math.inf, 0.0, False),
    ],
)
def test_the_gate_is_the_larger_of_tolerance_and_noise(value, noise, accepted):
    found = verdict(value, noise)
    assert found.accepted is accepted
    assert found.word == ("accepted" if accepted else "refused")
    assert found.reasons[0].startswith("refused: ") is not accepted


@pytest.mark.parametrize(
    ("change", "stderr", "accepted"),
    [(-0.02, NAN, True), (-0.03, NAN, False), (-0.03, 0.03, True), (0.5, 0.0, True)],
)
def test_no_task_may_lose_more_than_tolerance_or_noise(change, stderr, accepted):
    tasks = {
        "fine": (TaskScore("acc", 0.5, 0.01), TaskScore("acc", 0.5, 0.01)),
        "asked": (TaskScore("acc", 0.5, stderr), TaskScore("acc", 0.5 + change, stderr)),
    }
    found = verdict(1.0, tasks=tasks)
    assert found.accepted is accepted
    assert ("refused: asked" in found.reasons[2]) is not accepted


@pytest.mark.parametrize(("value", "lost"), [(1.5, False), (1.0, True), (1.5, True)])
def test_one_refusal_is_enough_wherever_it_stands(value, lost):
    fine = (TaskScore("acc", 0.5, 0.0), TaskScore("acc", 0.6, 0.0))
    bad = (TaskScore("acc", 0.5, 0.0), TaskScore("acc", 0.1, 0.0))
    found = verdict(value, tasks={"first": bad if lost else fine, "last": fine})
    assert not found.accepted
    said = [reason.startswith("refused: ") for reason in found.reasons]
    assert said == [value > 1.1, lost, False]


def part(unit, total, kept):
    return {"unit": unit, "total": total, "kept": kept}


def test_a_control_has_the_same_budget():
    ours = [part("weight", 100, 50), part("weight", 300, 150), part("head", 4, 2)]
    assert kept_shares(ours) == {"weight": 0.5, "head": 0.5}
    same_budget(ours, [part("weight", 10, 5), part("head", 2, 1)], 0.02)
    with pytest.raises(InputError, match=r"weights kept 0\.5000 in the model and 0\.6000"):
        same_budget(ours, [part("weight", 10, 6), part("head", 2, 1)], 0.02)
    with pytest.raises(InputError, match=r"heads kept 0\.5000 in the model and none"):
        same_budget(ours, [part("weight", 10, 5)], 0.02)
