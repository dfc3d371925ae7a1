"""The guard: a found prompt is taken only where it clearly beats the empty and the manual one."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.prompts.verdict import (
    Lead,
    Score,
    best_of,
    judge_prompts,
    lead,
    standard_error,
)


def score(hits, gold=None):
    hits = np.asarray(hits, np.float64)
    return Score(hits, np.log(0.2 + 0.6 * hits) if gold is None else np.asarray(gold, np.float64))


def test_score_of_log_probabilities():
    logprobs = np.log(np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5], [0.9, 0.1]], np.float32))
    made = Score.of(logprobs, np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(made.hit, [1, 0, 0, 0])  # a tie goes to the smaller code
    np.testing.assert_allclose(made.gold, np.log([0.7, 0.4, 0.5, 0.1]), rtol=1e-6)
    assert made.accuracy == 0.25


def test_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    expected = values.std(ddof=1) / np.sqrt(400)
    assert standard_error(values, seed=1) == pytest.approx(expected, rel=0.08)
    assert standard_error(values, seed=1) == standard_error(values, seed=1)
    assert standard_error(np.ones(1), seed=0) == 0.0
    assert standard_error(np.ones(50), seed=0) == 0.0


def test_the_error_is_paired():
    """Two prompts that are right on nearly the same rows differ clearly, however few are right."""
    rng = np.random.default_rng(1)
    rival = (rng.random(200) < 0.5).astype(float)
    found = rival.copy()
    found[np.flatnonzero(rival == 0)[:6]] = 1
    made = lead(score(found), score(rival), "accuracy", seed=0)
    assert made.mean == pytest.approx(0.03)
    assert made.clear
    unpaired = np.hypot(standard_error(found, seed=0), standard_error(rival, seed=2))
    assert made.mean < unpaired


def test_found_is_taken_only_past_both_rivals():
    weak, middle, strong = (
        np.r_[np.ones(20), np.zeros(44)],
        np.r_[np.ones(40), np.zeros(24)],
        np.ones(64),
    )
    taken = judge_prompts(
        {"found": score(strong), "empty": score(weak), "manual": score(middle)}, "accuracy", seed=0
    )
    assert taken.chosen == "found"
    refused = judge_prompts(
        {"found": score(middle), "empty": score(weak), "manual": score(strong)}, "accuracy", seed=0
    )
    assert refused.chosen == "manual"
    assert "manual" in refused.reason and "empty" not in refused.reason
    alone = judge_prompts({"found": score(middle), "empty": score(weak)}, "accuracy", seed=0)
    assert alone.chosen == "found"


def test_equal_prompts_change_nothing():
    same = score(np.r_[np.ones(10), np.zeros(10)])
    made = judge_prompts({"found": same, "empty": same, "manual": same}, "accuracy", seed=0)
    assert made.chosen == "empty"
    assert made.leads["empty"] == Lead(0.0, 0.0)


def test_a_lead_within_one_error_is_not_enough():
    """One row more of sixteen: the lead equals its standard error or less."""
    rival = np.r_[np.ones(8), np.zeros(8)]
    found = np.r_[np.ones(9), np.zeros(7)]
    made = judge_prompts({"found": score(found), "empty": score(rival)}, "accuracy", seed=0)
    assert made.leads["empty"].mean == 1 / 16
    assert made.chosen == ("found" if made.leads["empty"].error < 1 / 16 else "empty")
    swings = np.r_[np.ones(9), np.zeros(7)], np.r_[np.zeros(8), np.ones(8)]
    noisy = judge_prompts(
        {"found": score(swings[0]), "empty": score(swings[1])}, "accuracy", seed=0
    )
    assert noisy.chosen == "empty"


def test_the_control_is_compared_and_never_chosen():
    made = judge_prompts(
        {"found": score(np.zeros(8)), "empty": score(np.zeros(8)), "control": score(np.ones(8))},
        "accuracy",
        seed=0,
    )
    assert made.chosen == "empty"
    assert made.leads["control"].mean == -1.0


def test_log_likelihood_can_judge():
    hits = np.r_[np.ones(8), np.zeros(8)]
    better = score(hits, np.full(16, -0.5)), score(hits, np.full(16, -0.9))
    names = {"found": better[0], "empty": better[1]}
    assert judge_prompts(names, "log_likelihood", seed=0).chosen == "found"
    assert judge_prompts(names, "accuracy", seed=0).chosen == "empty"


def test_best_of_breaks_ties_by_loss_then_by_place():
    hits = np.r_[np.ones(8), np.zeros(8)]
    made = [score(hits, np.full(16, v)) for v in (-0.9, -0.5, -0.5)]
    assert best_of(made, "accuracy") == 1
    assert best_of([made[1], made[2]], "accuracy") == 0


def test_no_rows_no_verdict():
    nothing = score(np.zeros(0))
    with pytest.raises(InputError, match="rows"):
        judge_prompts({"found": nothing, "empty": nothing}, "accuracy", seed=0)
