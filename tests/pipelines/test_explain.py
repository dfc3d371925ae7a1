"""What became of a row, told from stored decisions: passages, retrieved passages, sentences."""

import json

import pytest

from prunery.errors import InputError
from prunery.pipelines.explain import explain
from prunery.storage import Store

from . import dataset_pages


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


@pytest.fixture
def labelled(tmp_path):
    """A function that writes a small pruned data set of some kind; its store."""

    def write(**options):
        store = Store(tmp_path / "labelled")
        dataset_pages.decision(store, dataset_pages.data(store, **options))
        return store

    return write


def test_a_row_of_a_data_set_has_its_label_and_its_content(labelled):
    store = labelled(groups=True)
    wrong, lost, kept, aside = 101, 106, 105, 109
    found = explain(store, "prune", wrong)
    assert found.place == "rows#2 (train), labelled '<dog>' but truly 'cat', group 'b'"
    assert found.text.startswith("PNG image, 8 x 8, L, ")
    assert found.lines()[-1] == (
        "  dropped by prune (best): below_border, score 0.1, threshold 0.5"
    )
    found = explain(store, "prune", lost)
    assert found.verdicts[0].rival == dataset_pages.IDS[2]
    assert "lost to row 102: rows#3 (train), labelled '<dog>', group 'a': PNG" in "\n".join(
        found.lines()
    )
    # The rows themselves lead to the same decision.
    assert explain(store, "data", kept).verdicts == explain(store, "prune", kept).verdicts
    assert explain(store, "data", aside).lines()[-1] == "  no step has decided about this row"


def test_the_weight_of_a_kept_row_is_said_where_it_is_not_one(labelled):
    store = labelled()
    reasons = [explain(store, "prune", id_).verdicts[0].reason for id_ in dataset_pages.IDS[:5]]
    assert reasons == ["top", "below_border", "top", "top, weight 2", "below_border"]


def test_text_and_features_are_shown(labelled):
    assert explain(labelled(kind="text"), "data", 102).text == "<script>2</script>"


def test_features_are_counted(labelled):
    store = labelled(kind="features", clean=[-1] * 10)
    found = explain(store, "data", 101)
    assert found.text == "10 features: 1, 1, 2, 3, 4, 5, 6, 7, …"
    assert found.place == "rows#2 (train), labelled '<dog>'"


def test_bytes_become_no_json(labelled):
    told = explain(labelled(), "data", 101).as_json()
    assert told["row"]["image"] == f"{len(dataset_pages.png(20))} bytes"
    assert told["row"]["label"] == 1
    json.dumps(told)
