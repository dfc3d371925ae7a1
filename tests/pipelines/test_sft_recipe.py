"""The bundled recipe `sft`, small: from rows to a page and a file that a trainer reads."""

import json

import pyarrow.parquet as pq
import pytest

from prunery.pipelines.explain import explain
from prunery.pipelines.recipe import Recipe, apply_overrides, load_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.sft_export import write_export
from prunery.storage import Store

ANSWERS = ("It returns the sum of both.", "It raises an error when the file is gone.", "No.")
SMALL = (
    "model.steps=4",
    "model.batch_tokens=128",
    "model.max_length=64",
    "model.vocab_size=400",
    "model.hidden_size=32",
    "model.layers=2",
    "model.checkpoints=1",
    "signals.rows_a_shard=10",
)


def small_sft(folder, *overrides) -> Recipe:
    """The recipe over 36 rows of two domains, one of them tiny."""
    path = folder / "rows.jsonl"
    rows = [
        {
            "prompt": f"What does number {i} do?",
            "completion": ANSWERS[i % 3] + f" Case {i}." * (i % 5),
            "topic": "rare" if i == 7 else "common",
            "untouched": {"kept": [i, None]},
        }
        for i in range(36)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (*SMALL, f"chats.path={path}", "chats.domain_field=topic", *overrides)
    return apply_overrides(load_recipe("sft"), settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("sft")
        patch.setenv("PRUNERY_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def finished(folder):
    store = Store(folder / "store")
    return run_recipe(small_sft(folder), store, threads=1), store


def keys(result):
    return {name: (m.key, m.logical_digest) for name, m in result.manifests.items()}


def test_rows_become_masks_a_trainer_reads(finished, tmp_path):
    result, store = finished
    totals = result.selections()["prune"]
    assert totals["samples"] == 36
    assert totals["samples_kept"] == 18
    assert 0 < totals["tokens_kept"] < totals["tokens"]
    made = write_export(store, result.manifests["export"].key, tmp_path / "out", format="trl")
    labels = pq.read_table(tmp_path / "out" / "train.parquet").column("labels").to_pylist()
    assert len(labels) == 18
    assert sum(label != -100 for row in labels for label in row) == totals["tokens_kept"]
    assert made.manifest["trained_tokens"] == totals["tokens_kept"]


def test_the_rows_that_are_left_come_back_untouched(finished, folder, tmp_path):
    result, store = finished
    write_export(store, result.manifests["export"].key, tmp_path / "out", format="rows")
    left = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(left) == 18
    assert set(left) <= set((folder / "rows.jsonl").read_text().splitlines())


def test_again_and_with_workers_it_is_the_same(finished, folder):
    result, store = finished
    again = run_recipe(small_sft(folder), store, threads=1)
    assert keys(again) == keys(result)
    assert {n: m.created for n, m in again.manifests.items()} == {
        n: m.created for n, m in result.manifests.items()
    }
    fresh = run_recipe(small_sft(folder), Store(folder / "other"), threads=1, workers=2)
    rows = {name: m.logical_digest for name, m in fresh.manifests.items()}
    assert rows == {name: m.logical_digest for name, m in result.manifests.items()}


def test_another_budget_runs_no_model(finished, folder):
    result, store = finished
    other = run_recipe(small_sft(folder, "prune.samples=0.25"), store, threads=1)
    for name in ("chats", "model", "tokens", "signals"):
        assert other.manifests[name].created == result.manifests[name].created
    assert other.selections()["prune"]["samples_kept"] == 9


def test_a_small_domain_survives_by_option(finished, folder):
    _, store = finished
    recipe = small_sft(folder, "prune.samples=0.1", "prune.by_domain=true")
    result = run_recipe(recipe, store, threads=1)
    kept = store.table(result.manifests["prune"].key).to_table().to_pylist()
    chats = store.table(result.manifests["chats"].key).to_table().to_pylist()
    rare = next(row["id"] for row in chats if row["domain"] == "rare")
    assert rare in {row["id"] for row in kept if row["keep"]}
    assert sum(row["keep"] for row in kept) == 1 + 4


def test_a_row_is_explained(finished):
    result, store = finished
    row = store.table(result.manifests["prune"].key).to_table().to_pylist()[7]
    said = "\n".join(explain(store, result.manifests["prune"].key, row["id"]).lines())
    assert "rows.jsonl#8 (rare)" in said
    assert "It raises an error" in said
    assert f"{row['kept_tokens']} of {row['tokens']} tokens" in said


def test_the_page_is_there(finished):
    result, _ = finished
    page = result.report.read_text()
    assert "36 → 18" in page
    assert "rare" in page
    assert result.lines()[-1] == f"report: {result.report}"
