"""Over grown input a step scores the new rows alone, and the table is as of a full run."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from prunery.pipelines import reuse
from prunery.pipelines.recipe import apply_overrides, parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.steps import STEPS
from prunery.pipelines.steps import embed as embed_step
from prunery.storage import Store

RECIPE = """
name: fresh
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, shard_bytes: 2000, tokenizer: "{encoder}"}}
  vectors: {{step: embed, inputs: {{chunks: chunks}}, encoder: "{encoder}", batch_size: 8}}
"""


@pytest.fixture
def rows(tmp_path, models):
    """A function that writes so many rows, in an order, and gives the recipe over them."""
    path = tmp_path / "rows.jsonl"

    def write(numbers, *overrides, title="t"):
        path.write_text(
            "".join(f'{{"text": "Row {i} says {i * i}.", "title": "{title}"}}\n' for i in numbers)
        )
        recipe = RECIPE.format(path=path, encoder=models[0])
        return apply_overrides(parse_recipe(recipe), overrides)

    return write


@pytest.fixture
def scored(monkeypatch):
    """Input rows that reached a model, in the order of the calls."""
    seen = []

    def count(job, rows, out):
        seen.extend(rows.column("id").to_pylist())
        embed_step.score(job, rows, out)

    made = dataclasses.replace(embed_step.ROWS, score=count)
    spec = dataclasses.replace(STEPS["embed"], row_wise=made, shard=made.make)
    monkeypatch.setitem(STEPS, "embed", spec)
    return seen


def vectors(store, ref="vectors"):
    table = store.table(ref).to_table()
    width = table.schema.field("embedding").type.list_size
    values = table.column("embedding").combine_chunks().flatten().to_numpy()
    return table.column("id").to_pylist(), values.reshape(-1, width)


def test_only_new_rows_are_scored_and_stand_in_order(rows, scored, tmp_path):
    store, full = Store(tmp_path / "store"), Store(tmp_path / "full")
    first = run_recipe(rows(range(200)), store, threads=1).manifests["vectors"]
    assert len(scored) == 200 and "reused" not in first.notes
    scored.clear()
    second = run_recipe(rows(range(220)), store, threads=1).manifests["vectors"]
    assert len(scored) == 20
    assert second.notes["reused"] == {first.key: 200}
    scored.clear()
    whole = run_recipe(rows(range(220)), full, threads=1).manifests["vectors"]
    assert len(scored) == 220
    assert whole.key == second.key and whole.rows == second.rows == second.kept
    ids, found = vectors(store)
    assert (ids, ids[:200]) == (vectors(full)[0], vectors(store, first.key)[0])
    np.testing.assert_allclose(found, vectors(full)[1], atol=1e-5)
    # What was taken over is the same to the bit.
    np.testing.assert_array_equal(found[:200], vectors(store, first.key)[1])


def test_reuse_can_be_left_off(rows, scored, tmp_path):
    store, full = Store(tmp_path / "store"), Store(tmp_path / "full")
    run_recipe(rows(range(30)), store, threads=1)
    scored.clear()
    fresh = run_recipe(rows(range(40)), store, threads=1, reuse=False).manifests["vectors"]
    assert len(scored) == 40
    other = run_recipe(rows(range(40)), full, threads=1).manifests["vectors"]
    assert fresh.logical_digest == other.logical_digest


def test_an_equal_id_with_another_title_is_another_row(rows, scored, tmp_path):
    store = Store(tmp_path / "store")
    run_recipe(rows(range(20), title="old"), store, threads=1)
    scored.clear()
    made = run_recipe(rows(range(20), title="new"), store, threads=1).manifests["vectors"]
    assert len(scored) == 20 and "reused" not in made.notes


def test_other_options_models_and_seeds_are_other_tables(rows, scored, tmp_path):
    store = Store(tmp_path / "store")
    run_recipe(rows(range(10)), store, threads=1)
    for override in ("vectors.batch_size=4", "seed=3"):
        scored.clear()
        run_recipe(rows(range(12), override), store, threads=1)
        assert len(scored) == 12


def test_the_table_with_most_in_common_is_taken(rows, scored, tmp_path):
    store = Store(tmp_path / "store")
    wide = run_recipe(rows(range(100)), store, threads=1).manifests["vectors"]
    run_recipe(rows(range(10)), store, threads=1)
    scored.clear()
    made = run_recipe(rows(range(104)), store, threads=1).manifests["vectors"]
    assert len(scored) == 4
    assert made.notes["reused"] == {wide.key: 100}


def test_stopped_and_run_again_scores_no_row_twice(rows, scored, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    run_recipe(rows(range(100)), store, threads=1)
    scored.clear()
    grown = rows(range(160))
    spec, done = STEPS["embed"], []

    def failing(job, index, out):
        if len(done) == 3:
            raise OSError("the power went away")
        done.append(index)
        spec.shard(job, index, out)

    with monkeypatch.context() as patch:
        patch.setitem(STEPS, "embed", dataclasses.replace(spec, shard=failing))
        with pytest.raises(OSError, match="power"):
            run_recipe(grown, store, threads=1)
    made = run_recipe(grown, store, threads=1).manifests["vectors"]
    assert len(scored) == len(set(scored)) == 60
    assert sum(made.notes["reused"].values()) == 100
    assert store.verify() == []


def test_processes_take_over_the_same_rows(rows, tmp_path):
    stores = [Store(tmp_path / name) for name in ("here", "processes")]
    found = []
    for store, workers in zip(stores, (1, 2), strict=True):
        run_recipe(rows(range(60)), store, threads=1)
        found.append(run_recipe(rows(range(80)), store, workers=workers, threads=1))
    here, there = (result.manifests["vectors"] for result in found)
    assert here.logical_digest == there.logical_digest
    assert here.notes["reused"] == there.notes["reused"]


def test_rows_of_a_retrieved_passage_follow_it(finished, small, monkeypatch):
    """Passages that were retrieved before keep their sentences' signals; the others are scored."""
    store, name = finished.store, "signals"
    spec = STEPS["context_signals"]
    manifest = finished.of_step("context_signals")
    name = next(n for n, m in finished.manifests.items() if m is manifest)
    retrieved = finished.of_step("retrieve")
    seen = []

    def count(job, rows, out):
        seen.extend(rows.column("id").to_pylist())
        spec.row_wise.score(job, rows, out)

    made = dataclasses.replace(spec.row_wise, score=count)
    monkeypatch.setitem(
        STEPS, "context_signals", dataclasses.replace(spec, row_wise=made, shard=made.make)
    )
    retrieve = next(n for n, m in finished.manifests.items() if m is retrieved)
    top = finished.manifests[retrieve].options["top_k"]
    more = run_recipe(small(f"{retrieve}.top_k={top + 1}"), store, threads=1)
    again = more.manifests[name]
    old = set(store.table(retrieved.key).to_table(columns=["id"]).column("id").to_pylist())
    key = more.manifests[retrieve].key
    new = store.table(key).to_table(columns=["id"]).column("id").to_pylist()
    if "terms" in manifest.options["signals"]:
        assert set(seen) == set(new)  # another passage changes the terms' weights of all
    else:
        assert set(seen) == set(new) - old
    passages = store.table(again.key).to_table(columns=["passage"]).column("passage").to_pylist()
    assert list(dict.fromkeys(passages)) == new


def test_rows_that_group_together_are_taken_together():
    made = reuse._same(
        pa.table({"id": [1, 2, 3, 4], "x": ["a", "b", "c", "d"]}),
        pa.table({"id": [3, 1, 2, 2], "x": ["c", "other", "b", "b"]}),
    )
    assert made.tolist() == [False, False, True, False]
