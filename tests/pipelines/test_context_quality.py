"""Figures from scores, by hand: two questions, five sentences, two methods."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prunery.pipelines.context_metrics import Labelled
from prunery.pipelines.context_quality import Scores, Settings, measure, pick


def ints(*values):
    return np.array(values, np.int64)


# A: 10, 20, 10 characters, evidence is the second; B: 30, 30, evidence is the first.
DATA = Labelled(
    passage=ints(0, 0, 0, 1, 1),
    question=ints(0, 1),
    chars=ints(10, 20, 10, 30, 30),
    label=ints(0, 1, 0, 1, 0),
    relevant=ints(1, 1),
    span_question=ints(0),
    span_first=ints(1),
    span_last=ints(2),
    questions=2,
)
OURS = np.array([0.1, 0.9, 0.3, 0.8, 0.2], np.float32)
WORSE = np.array([0.9, 0.1, 0.2, 0.3, 0.8])
SETTINGS = Settings(
    main="ours",
    threshold=0.25,
    thresholds=(0.5,),
    targets=(0.5,),
    best_k=(1, 2),
    resamples=200,
    seed=0,
    probabilities=frozenset({"ours"}),
)


@pytest.fixture(scope="module")
def quality():
    scores = Scores(
        sentence={"ours": OURS, "worse": WORSE},
        other={"ours": np.array([0.6, 0.1, 0.3]), "worse": np.array([0.1, 0.1, 0.1])},
        other_chars=ints(10, 20, 70),
        other_passage=ints(0, 0, 1),
    )
    return measure(DATA, scores, SETTINGS)


@pytest.mark.parametrize(
    ("method", "rule", "at", "metric", "value"),
    [
        # Falling: 20 (A's evidence), 30 (B's evidence) | 10, 30, 10: half is removed exactly there.
        ("ours", "equal", 0.5, "evidence_kept", 1.0),
        ("ours", "equal", 0.5, "removed", 0.5),
        ("ours", "equal", 0.5, "f2", 1.0),
        # The answer needs A's second and third: 0.3 comes at 40 % removed; at 50 % it is lost.
        ("ours", "equal", 0.5, "answer_kept", 0.0),
        # Falling: 10, 30 | 30 (B's evidence): at half, a third of the step from 0 to 0.5.
        ("worse", "equal", 0.5, "evidence_kept", 0.5 / 3),
        ("worse", "equal", 0.5, "evidence_kept_lead", 1 - 0.5 / 3),
        ("ours", "best", 1.0, "evidence_kept", 1.0),
        ("ours", "best", 1.0, "removed", 0.5),
        ("ours", "best", 1.0, "removed_mean", (20 / 40 + 30 / 60) / 2),
        ("ours", "best", 2.0, "removed", 0.1),
        ("ours", "best", 2.0, "answer_kept", 1.0),
        ("worse", "best", 1.0, "evidence_kept", 0.0),
        ("worse", "best", 2.0, "evidence_kept", 0.5),
        ("ours", "threshold", 0.25, "evidence_kept", 1.0),
        ("ours", "threshold", 0.25, "removed", 0.4),
        ("ours", "threshold", 0.25, "precision", 2 / 3),
        ("ours", "threshold", 0.25, "answer_kept", 1.0),
        ("ours", "threshold", 0.5, "removed", 0.5),
        ("ours", "threshold", 0.25, "kept_middle", 1.0),
        ("ours", "scores", None, "auroc", 1.0),
        ("worse", "scores", None, "auroc", 1 / 6),
        ("worse", "scores", None, "auroc_within", 0.0),
        ("ours", "other_threshold", 0.25, "removed", 0.2),
        ("ours", "other_threshold", 0.5, "removed", 0.9),
        ("ours", "other_threshold", 0.5, "emptied", 0.5),
        # "worse" removes half of its own passages at level 0.3 or 0.8; all others lie below.
        ("worse", "other_equal", 0.5, "removed", 1.0),
    ],
)
def test_figures_by_hand(quality, method, rule, at, metric, value):
    got = quality.find(method, rule, metric, at)
    assert got is not None, [(f.method, f.rule, f.at, f.metric) for f in quality.figures]
    assert got.value == pytest.approx(value, abs=1e-7)


def test_only_probabilities_have_thresholds_and_calibration(quality):
    assert not pick(quality.figures, method="worse", rule="threshold")
    assert set(quality.calibration) == {"ours"}


def test_the_paired_lead_is_surer_than_the_two_figures(quality):
    """Two methods that fail on the same questions differ by nothing, however few those are."""
    same = measure(DATA, Scores(sentence={"ours": OURS, "worse": OURS * 0.5}), SETTINGS)
    lead = same.find("worse", "equal", "evidence_kept_lead", 0.5)
    assert (lead.value, lead.low, lead.high) == (0.0, 0.0, 0.0)


def test_curves_fall_as_more_is_removed(quality):
    for curve in quality.curves.values():
        assert curve["removed"][0] == 0.0
        assert curve["evidence_kept"][0] == 1.0
        assert all(np.diff(curve["evidence_kept"]) <= 1e-12)


def test_unlabelled_rows_leave_figures_out(quality):
    bare = Labelled(
        passage=DATA.passage,
        question=DATA.question,
        chars=DATA.chars,
        label=ints(-1, -1, -1, -1, -1),
        relevant=ints(-1, -1),
        span_question=ints(),
        span_first=ints(),
        span_last=ints(),
        questions=2,
    )
    got = measure(bare, Scores(sentence={"ours": OURS}, passage={"ours": OURS[:2]}), SETTINGS)
    assert {f.metric for f in got.figures} == {"removed", "removed_mean"}
    assert not got.curves
    assert not got.calibration


def test_rerank_needs_candidates_and_judgements():
    data = Labelled(
        passage=np.arange(5),
        question=ints(0, 0, 0, 1, 1),
        chars=ints(1, 1, 1, 1, 1),
        label=ints(-1, -1, -1, -1, -1),
        relevant=ints(0, 1, 0, 1, -1),  # the second question has an unjudged candidate
        span_question=ints(),
        span_first=ints(),
        span_last=ints(),
        questions=2,
    )
    passage = {"ours": np.array([3.0, 2.0, 1.0, 0.0, 0.0]), "worse": np.zeros(5)}
    got = measure(data, Scores(sentence={"ours": np.zeros(5)}, passage=passage), SETTINGS)
    assert got.find("ours", "rerank", "mrr").value == 0.5
    assert got.find("ours", "rerank", "mrr").n == 1
    assert got.find("worse", "rerank", "mrr_lead").value == pytest.approx(0.5 - 1 / 3)
    single = measure(DATA, Scores(sentence={"ours": OURS}, passage={"ours": OURS[:2]}), SETTINGS)
    assert single.find("ours", "rerank", "mrr") is None


def test_json_holds_no_nan(quality):
    text = json.dumps(quality.to_json(), allow_nan=False)
    assert json.loads(text)["figures"][0]["method"] == "ours"


def test_same_seed_same_figures(quality):
    again = measure(DATA, Scores(sentence={"ours": OURS, "worse": WORSE}), SETTINGS)
    assert set(again.figures) <= set(quality.figures)
