"""The quality benchmark: its rows, its look for training data, and its place in RESULTS.md."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from prunery.pipelines.evaluation_rows import ContextRow, flatten, parse_row, read_rows


@pytest.fixture(scope="module")
def sets(root):
    """`benchmarks/quality_data.py`; the folder holds scripts, no package."""
    sys.path.insert(0, str(root / "benchmarks"))
    yield import_module("quality_data")
    sys.path.remove(str(root / "benchmarks"))


def row(question: str, passage: str) -> ContextRow:
    return parse_row({"question": question, "passage": passage}, where="x")


def test_overlap_by_hand(sets):
    held = [
        row("Who was it?", "one two three four five six seven eight nine ten"),
        row("New one", "alpha beta gamma delta epsilon zeta eta theta iota kappa"),
        row("Other", "short text"),
    ]
    trained = [
        ("who was it", "nothing of the kind stands here at all today"),
        # Two of the first passage's six five-word sequences: a third, more than a fifth.
        ("", "one two three four five six and then other words follow on"),
        # One of the second's six: less than a fifth.
        ("", "alpha beta gamma delta epsilon and then other words follow on"),
        ("", "Short text!"),
    ]
    seen = sets.seen(trained, held)
    assert seen.count(held) == {
        "questions": 1,
        "of_questions": 3,
        "passages": 2,
        "of_passages": 3,
    }
    assert seen.without(held) == [held[1]]
    assert sets.seen([], held).without(held) == held


def test_seen_rows_are_not_measured(sets):
    quality = import_module("quality")
    rows = [
        replace(
            row(f"question {g}", f"passage number {g} {c} with words enough to count"),
            group=f"g{g}",
            relevant=int(c == 0),
        )
        for g in range(2)
        for c in range(3)
    ]
    known = sets.Seen(frozenset(), frozenset({rows[0].passage, rows[4].passage}))
    assert quality.unseen("qed", rows, known) == [rows[1], rows[2], rows[3], rows[5]]
    # Group 0 lost its gold passage. Candidates that were seen stay in "multidoc" alone.
    assert quality.unseen("multidoc", rows, known) == rows[3:]
    assert quality.unseen("multidoc-unseen", rows, known) == [rows[3], rows[5]]


def test_borders_cover_the_text(sets):
    assert sets.borders([0, 10, 20], 30) == ((0, 10), (10, 20), (20, 30))
    assert sets.borders([3, 10, 30], 30) == ((0, 3), (3, 10), (10, 30))


def test_rows_are_written_once_and_read_back(sets, tmp_path):
    rows = [row("q?", "One here. Two there.")]
    path = sets.write_rows(tmp_path / "rows.jsonl", rows)
    before = path.stat().st_mtime_ns
    assert read_rows([path]) == rows
    sets.write_rows(path, rows)
    assert path.stat().st_mtime_ns == before


def test_the_section_replaces_its_own_text_alone(sets, tmp_path):
    quality = import_module("quality")
    path = tmp_path / "RESULTS.md"
    quality.write_section(path, "quality", "first")
    path.write_text(path.read_text() + "\n<!-- speed:begin -->\nfast\n<!-- speed:end -->\n")
    quality.write_section(path, "quality", "second")
    text = path.read_text()
    assert "first" not in text
    assert text.count("second") == 1
    assert "fast" in text
    assert text.count("<!-- quality:begin -->") == 1


def test_qed_rows_carry_the_selected_sentence(sets, shared_data):
    rows = sets.qed(shared_data)
    headline = sets.qed_headline(rows)
    assert len(rows) == 1099
    assert len(headline) == 595
    assert sum(sum(r.labels) == 1 for r in headline) == 580
    items = {
        str(i["example_id"]): i
        for i in sets.lines(shared_data / "rag_qed" / "qed-dev.jsonlines.gz")
    }
    for r in headline:
        chosen = items[r.group]["annotation"]["selected_sentence"]["string"].strip()
        assert chosen in "".join(t for t, one in zip(r.texts, r.labels, strict=True) if one)
    data = flatten(rows).data
    assert len(set(data.span_question.tolist())) == 1099  # an answer occurs in every passage


def test_multidoc_has_one_gold_passage_a_question(sets, shared_data):
    rows = sets.multidoc(shared_data, candidates=10, questions=5)
    assert len(rows) == 50
    data = flatten(rows).data
    assert (data.relevant == 1).sum() == 5
    assert data.questions == 5


def test_xquad_evidence_holds_the_answer(sets, shared_data):
    rows = sets.xquad(shared_data, "de")
    assert len(rows) > 800
    held = [r for r in rows if r.answers[0] in r.texts[r.labels.index(1)]]
    assert len(held) > 0.95 * len(rows)
    assert json.loads(json.dumps(rows[0].sentences)) == [list(s) for s in rows[0].sentences]


def test_hotpot_counts_passages_without_a_fact(sets, shared_data):
    rows = sets.hotpot(shared_data)
    assert len({r.group for r in rows}) == 100
    facts = [sum(r.labels) for r in rows]
    assert min(facts) == 0
    assert all((1 in r.labels) == bool(r.relevant) for r in rows)
    assert all("".join(r.texts) == r.passage for r in rows)
