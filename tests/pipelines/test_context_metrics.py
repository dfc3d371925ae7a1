"""Golden cases worked by hand, and every fast path against the slow expression it replaces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.context_metrics import (
    Labelled,
    Sweep,
    answer_level,
    bootstrap_weights,
    evidence_level,
    flatten_ids,
    interval,
    question_mean,
    rank_in_passage,
)
from prunery.pipelines.sentence_metrics import (
    auroc,
    auroc_within,
    by_position,
    confusion,
    ndcg,
    reciprocal_rank,
    reliability,
)


def labelled(sizes, owners, chars, labels, spans=(), relevant=None) -> Labelled:
    """Passages by size; `spans` are (question, first sentence, last sentence)."""
    spans = np.array(spans, np.int64).reshape(-1, 3)
    return Labelled(
        passage=np.repeat(np.arange(len(sizes)), sizes),
        question=np.array(owners, np.int64),
        chars=np.array(chars, np.int64),
        label=np.array(labels, np.int64),
        relevant=np.array(relevant if relevant is not None else [-1] * len(sizes), np.int64),
        span_question=spans[:, 0],
        span_first=spans[:, 1],
        span_last=spans[:, 2],
        questions=max(owners) + 1,
    )


# Two questions, one passage each: A has 3 sentences (10, 20, 10 characters), B has 2 (30, 30).
# Evidence: A's second, B's first. The answer of A runs over its sentences 1-2.
TWO = labelled([3, 2], [0, 1], [10, 20, 10, 30, 30], [0, 1, 0, 1, 0], [(0, 1, 2), (1, 3, 3)])
SCORE = np.array([0.1, 0.9, 0.3, 0.5, 0.7])


def test_levels_by_hand():
    assert evidence_level(TWO, SCORE).tolist() == [0.9, 0.5]
    assert answer_level(TWO, SCORE).tolist() == [0.3, 0.5]  # A needs both 0.9 and 0.3


def test_curve_by_hand():
    curve = Sweep(TWO, SCORE, evidence_level(TWO, SCORE)).curve()
    # Falling scores keep 20, 30, 30, 10, 10 of 100 characters.
    assert curve.level.tolist() == [np.inf, 0.9, 0.7, 0.5, 0.3, 0.1]
    assert curve.removed == pytest.approx([1, 0.8, 0.5, 0.2, 0.1, 0.0])
    assert curve.value == pytest.approx([0, 0.5, 0.5, 1, 1, 1])


@pytest.mark.parametrize(
    ("target", "value"),
    [(0.8, 0.5), (0.5, 0.5), (0.35, 0.75), (0.2, 1.0), (0.0, 1.0), (1.0, 0.0), (0.9, 0.25)],
)
def test_value_at_an_exact_share_removed(target, value):
    sweep = Sweep(TWO, SCORE, evidence_level(TWO, SCORE))
    assert sweep.at_removed([target])[0] == pytest.approx([value])


def test_at_level_keeps_what_reaches_the_level():
    sweep = Sweep(TWO, SCORE, evidence_level(TWO, SCORE))
    for level, removed, value in [(0.5, 0.2, 1.0), (0.50001, 0.5, 0.5), (2.0, 1.0, 0.0)]:
        got = sweep.at_levels([level])
        assert (got[0][0, 0], got[1][0, 0]) == pytest.approx((removed, value))
    assert sweep.level_at(0.25) == 0.5


def test_ties_are_one_level_and_a_constant_score_is_a_straight_line():
    sweep = Sweep(TWO, np.zeros(5), evidence_level(TWO, np.zeros(5)))
    assert sweep.curve().removed.tolist() == [1.0, 0.0]
    assert sweep.at_removed([0.59])[0] == pytest.approx([0.41])


def test_best_k_is_the_sweep_over_minus_the_rank():
    rank = rank_in_passage(TWO, SCORE)
    assert rank.tolist() == [2, 0, 1, 1, 0]
    assert rank_in_passage(TWO, np.zeros(5)).tolist() == [0, 1, 2, 0, 1]  # ties: the earlier
    sweep = Sweep(TWO, -rank, evidence_level(TWO, -rank))
    removed, value = sweep.at_levels([-0.0, -1.0])  # best one, best two
    assert removed[0] == pytest.approx([0.5, 0.1])
    assert value[0] == pytest.approx([0.5, 1.0])


def test_questions_without_evidence_count_for_characters_only():
    data = labelled([1, 1], [0, 1], [10, 30], [1, 0])
    score = np.array([1.0, 2.0])
    sweep = Sweep(data, score, evidence_level(data, score))
    assert sweep.counted == 1
    assert np.isnan(evidence_level(data, score)[1])
    assert sweep.curve().removed == pytest.approx([1, 0.25, 0])
    assert sweep.curve().value == pytest.approx([0, 0, 1])


def test_an_answer_that_never_occurs_is_unknown_not_lost():
    data = labelled([2], [0], [5, 5], [0, 0])
    assert np.isnan(answer_level(data, [1.0, 2.0])).all()
    assert np.isnan(Sweep(data, [1.0, 2.0], answer_level(data, [1.0, 2.0])).at_removed([0.5])).all()


def test_an_answer_in_two_places_survives_in_the_better_one():
    data = labelled([2, 2], [0, 0], [1] * 4, [0] * 4, [(0, 0, 1), (0, 2, 2), (0, 3, 3)])
    assert answer_level(data, [0.9, 0.2, 0.4, 0.1]).tolist() == [0.4]


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    n = sum(sizes)
    owners = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    chars = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    labels = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=n, max_size=n))
    score = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=n, max_size=n))
    passage = np.repeat(np.arange(len(sizes)), sizes)
    spans = []
    for first in draw(st.lists(st.integers(0, n - 1), max_size=4)):
        last = min(
            first + draw(st.integers(0, 2)), int(np.flatnonzero(passage == passage[first])[-1])
        )
        spans.append((owners[passage[first]], first, last))
    return labelled(sizes, owners, chars, labels, spans), np.array(score)


def brute(data, score, threshold, weights, kind):
    """Keep, count and divide in plain loops."""
    keep = [s >= threshold for s in score]
    owner = data.owner
    removed = sum(weights[owner[i]] * data.chars[i] for i in range(len(score)) if not keep[i])
    whole = sum(weights[owner[i]] * data.chars[i] for i in range(len(score)))
    top = bottom = 0
    for q in range(data.questions):
        if kind == "evidence":
            needed = [i for i in range(len(score)) if owner[i] == q and data.label[i] == 1]
            known, kept = bool(needed), all(keep[i] for i in needed)
        else:
            spans = [
                (a, b)
                for o, a, b in zip(data.span_question, data.span_first, data.span_last, strict=True)
                if o == q
            ]
            known, kept = bool(spans), any(all(keep[a : b + 1]) for a, b in spans)
        if known:
            bottom += weights[q]
            top += weights[q] * kept
    return removed / whole if whole else None, top / bottom if bottom else None


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0, 1.5]), st.integers(0, 9))
def test_sweep_equals_the_loop_it_replaces(problem, threshold, seed):
    data, score = problem
    weights = bootstrap_weights(data.questions, 3, seed)
    for kind, level in (("evidence", evidence_level), ("answer", answer_level)):
        sweep = Sweep(data, score, level(data, score))
        removed, value = sweep.at_levels([threshold], weights)
        for b in range(3):
            want_removed, want = brute(data, score, threshold, weights[b], kind)
            if want_removed is not None:
                assert removed[b, 0] == pytest.approx(want_removed)
            assert (want is None and np.isnan(value[b, 0])) or value[b, 0] == pytest.approx(want)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0, 1))
def test_value_at_removed_lies_between_its_neighbours(problem, target):
    data, score = problem
    sweep = Sweep(data, score, evidence_level(data, score))
    if not sweep.counted:
        return
    curve = sweep.curve()
    got = sweep.at_removed([target])[0, 0]
    assert np.interp(target, curve.removed[::-1], curve.value[::-1]) == pytest.approx(got)


def test_bootstrap_is_seeded_paired_and_resamples_questions():
    a, b = bootstrap_weights(5, 200, 7), bootstrap_weights(5, 200, 7)
    assert (a == b).all()
    assert (a.sum(axis=1) == 5).all()
    assert (bootstrap_weights(5, 200, 8) != a).any()
    assert bootstrap_weights(0, 3, 0).shape == (3, 0)
    # A sweep over repeated questions equals the sweep with weights.
    sweep = Sweep(TWO, SCORE, evidence_level(TWO, SCORE))
    assert sweep.at_removed([0.2], np.array([[1, 1]]))[0] == pytest.approx([1.0])
    # Question A twice, B never: 40 characters doubled; keeping 0.9 removes half of them.
    removed, value = sweep.at_levels([0.9], np.array([[2, 0]]))
    assert (removed[0, 0], value[0, 0]) == pytest.approx((0.5, 1.0))


def test_many_resamples_are_chunked_without_a_seam():
    weights = bootstrap_weights(2, 150, 0)
    sweep = Sweep(TWO, SCORE, evidence_level(TWO, SCORE))
    whole = sweep.at_removed([0.4, 0.7], weights)
    assert whole.shape == (150, 2)
    single = [sweep.at_removed([0.4, 0.7], weights[i : i + 1])[0] for i in range(150)]
    assert whole == pytest.approx(np.array(single))


def test_interval_covers_the_mean_of_a_coin():
    flips = (np.arange(400) % 2).astype(float)
    got = question_mean(flips, bootstrap_weights(400, 2000, 0))
    assert got.value == 0.5
    assert got.n == 400
    # The normal approximation is 0.5 -+ 1.96 * 0.5 / 20.
    assert got.low == pytest.approx(0.451, abs=0.006)
    assert got.high == pytest.approx(0.549, abs=0.006)


def test_nothing_to_measure_is_none_never_zero():
    assert interval(float("nan"), [0.0], 3).value is None
    assert question_mean([np.nan, np.nan], bootstrap_weights(2, 10, 0)).value is None
    assert question_mean([1.0, np.nan], np.array([[0, 2], [1, 1]])).low == 1.0


def test_f2_by_hand():
    keep = np.array([True, True, False, False, True])
    counts = confusion(TWO, keep)
    assert counts.hit.tolist() == [1, 0]
    assert counts.false_alarm.tolist() == [1, 1]
    assert counts.miss.tolist() == [0, 1]
    got = counts.f_beta(np.array([[1, 1], [2, 0]]))
    assert got["precision"].value == pytest.approx(1 / 3)
    assert got["recall"].value == pytest.approx(1 / 2)
    assert got["f2"].value == pytest.approx(5 / (5 + 4 + 2))
    # Second resample: two of A: precision 1/2, recall 1.
    assert got["recall"].high == pytest.approx(0.5 + 0.5 * 0.975)


def test_unknown_labels_count_nowhere():
    data = labelled([3], [0], [1, 1, 1], [1, -1, 0])
    counts = confusion(data, np.array([True, True, True]))
    assert (counts.hit[0], counts.false_alarm[0], counts.miss[0]) == (1, 1, 0)


def test_auroc_against_all_pairs():
    rng = np.random.default_rng(3)
    score, truth = rng.integers(0, 6, 200) / 5, rng.random(200) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth] for b in score[~truth]]
    assert auroc(score, truth) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc([1.0], [True]))


def test_auroc_within_ignores_shifts_between_passages():
    assert auroc_within(TWO, SCORE) == pytest.approx((1.0 + 0.0) / 2)
    shifted = SCORE + np.array([100, 100, 100, 0, 0])
    assert auroc_within(TWO, shifted) == auroc_within(TWO, SCORE)
    assert auroc(shifted, TWO.label == 1) != auroc(SCORE, TWO.label == 1)


def test_reliability_by_hand():
    got = reliability([0.05, 0.15, 0.95, 1.0], [0, 1, 1, 1], bins=10)
    assert got.count.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert got.stated[9] == pytest.approx(0.975)
    assert np.isnan(got.stated[5])
    assert got.ece == pytest.approx((0.05 + 0.85 + 2 * 0.025) / 4)
    assert got.brier == pytest.approx((0.05**2 + 0.85**2 + 0.05**2) / 4)
    with pytest.raises(InputError, match="probabilities"):
        reliability([1.2], [1])


def test_positions_by_hand():
    data = labelled([3, 3, 2], [0, 1, 2], [1] * 8, [1, 0, 0, 0, 1, 1, 1, 0])
    kept = np.array([True, False, False, False, False, True, True, True])
    got = by_position(data, kept, np.ones((4, 3), np.int64))
    assert got["first"].value == 1.0
    assert got["first"].n == 1  # the passage of two sentences is left out
    assert got["middle"].value == 0.0
    assert got["last"].value == 1.0


def test_rank_figures_by_hand():
    question = np.array([0, 0, 0, 1, 1, 2])
    score = np.array([0.1, 0.9, 0.5, 0.3, 0.7, 0.5])
    relevant = np.array([1, 0, 1, 1, 0, 0])
    mrr = reciprocal_rank(question, score, relevant, 3)
    assert mrr[:2] == pytest.approx([1 / 2, 1 / 2])
    assert np.isnan(mrr[2])  # nothing relevant: unknown
    got = ndcg(question, score, relevant, 3)
    dcg = 1 / np.log2(3) + 1 / np.log2(4)
    assert got[0] == pytest.approx(dcg / (1 + 1 / np.log2(3)))
    assert got[1] == pytest.approx(1 / np.log2(3))
    assert ndcg(question, score, relevant, 3, k=1)[0] == 0.0


def test_a_constant_score_earns_nothing_from_gold_standing_first():
    question, relevant = np.zeros(10, np.int64), np.array([1] + [0] * 9)
    assert reciprocal_rank(question, np.zeros(10), relevant, 1)[0] == pytest.approx(0.1)
    assert ndcg(question, np.zeros(10), relevant, 1)[0] == pytest.approx(1 / np.log2(11))


def test_misaligned_or_broken_inputs_are_refused():
    with pytest.raises(InputError, match="chars"):
        labelled([2], [0], [1], [0, 0])
    with pytest.raises(InputError, match="at least one sentence"):
        labelled([2, 0, 1], [0, 0, 0], [1] * 3, [0] * 3)
    with pytest.raises(InputError, match="finite"):
        Sweep(TWO, [np.nan] * 5, evidence_level(TWO, SCORE))
    with pytest.raises(InputError, match="finite"):
        reciprocal_rank(np.zeros(1, np.int64), [np.nan], np.ones(1, np.int64), 1)


def test_groups_are_numbered_by_name_not_by_order():
    index, names = flatten_ids(["b", "a", "b"])
    assert index.tolist() == [1, 0, 1]
    assert names == ["a", "b"]
