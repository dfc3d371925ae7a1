"""What became of a row, told from stored decisions: passages, retrieved passages, sentences."""

import pytest

from prunery.errors import InputError
from prunery.pipelines.explain import explain


def table(finished, name):
    return finished.store.table(finished.manifests[name].key).to_table().to_pylist()


def test_a_dropped_passage_names_the_one_it_lost_to(finished):
    chunks = {row["id"]: row for row in table(finished, "chunks")}
    (dropped,) = [row for row in table(finished, "distinct") if not row["keep"]]
    found = explain(finished.store, "chunks", dropped["id"])
    (verdict,) = found.verdicts
    assert (verdict.table, verdict.method, verdict.kept) == ("distinct", "near_duplicate", False)
    assert verdict.reason == "near_duplicate"
    assert verdict.score == dropped["score"]
    assert verdict.threshold == pytest.approx(1e-5)
    assert verdict.rival == dropped["rival"]
    rival = chunks[dropped["rival"]]
    assert rival["source"] in verdict.rival_text
    assert rival["text"][:20] in verdict.rival_text
    assert found.seen == ["retrieved: no question found it"]
    text = "\n".join(found.lines())
    assert "dropped by distinct (near_duplicate): near_duplicate, score" in text
    assert f"lost to row {dropped['rival']}" in text


def test_a_kept_passage_says_which_questions_found_it(finished):
    retrieved = table(finished, "retrieved")
    passage = retrieved[0]["passage"]
    found = explain(finished.store, "chunks", passage)
    assert [v.kept for v in found.verdicts] == [True]
    times = sum(row["passage"] == passage for row in retrieved)
    assert found.seen[0] == f"retrieved: found by {times} questions"
    assert len(found.seen) == 1 + times


def test_a_sentence_has_its_score_threshold_and_reason(finished):
    decided = {row["id"]: row for row in table(finished, "prune")}
    chunks = {row["id"]: row for row in table(finished, "chunks")}
    for sentence in table(finished, "signals")[:8]:
        found = explain(finished.store, "signals", sentence["id"])
        (verdict,) = found.verdicts
        row = decided[sentence["id"]]
        assert (verdict.kept, verdict.score, verdict.threshold, verdict.reason) == (
            row["keep"], row["score"], 0.5, row["reason"],
        )  # fmt: skip
        text = chunks[sentence["chunk"]]["text"]
        assert found.text == text[sentence["start"] : sentence["end"]]
        # The decision table leads to the same answer.
        assert explain(finished.store, "prune", sentence["id"]).verdicts == [verdict]


def test_a_retrieved_passage_lists_its_sentences(finished):
    (row,) = table(finished, "retrieved")[:1]
    for name in ("retrieved", "contexts"):
        found = explain(finished.store, name, row["id"])
        sentences = [s for s in table(finished, "signals") if s["passage"] == row["id"]]
        assert [part.row for part in found.parts] == [s["id"] for s in sentences]
        kept = sum(part.kept for part in found.parts)
        assert f"  {kept} of its {len(sentences)} sentences were kept:" in found.lines()
        assert found.as_json()["parts"][0]["reason"] == found.parts[0].reason


def test_rows_that_do_not_exist_and_tables_without_rows(finished):
    with pytest.raises(InputError, match="has no row 12. `prunery show chunks` prints ids"):
        explain(finished.store, "chunks", 12)
    with pytest.raises(InputError, match="has no row ids"):
        explain(finished.store, "report", 12)


def test_a_question_has_no_decision(finished):
    question = table(finished, "questions")[0]
    lines = explain(finished.store, "questions", question["id"]).lines()
    assert lines[-1] == "  no step has decided about this row"
