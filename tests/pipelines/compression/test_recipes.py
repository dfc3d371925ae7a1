"""The bundled recipes of the compression stage, small: from rows to a model that loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.recipe import apply_overrides, load_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

from ..test_sft_recipe import SMALL

FEW = (
    "calibration.rows=16",
    "calibration.length=32",
    "evaluation.rows=6",
    "evaluation.length=32",
    "evaluation.evaluation_share=0.3",
    "calibration.evaluation_share=0.3",
    "recovered.steps=4",
    "verdict.speed=false",
    "verdict.tolerance=100",
)


def write_rows(folder):
    path = folder / "rows.jsonl"
    kinds = ("sum", "list", "file", "word", "page")
    rows = [
        {
            "prompt": f"What does the {kinds[i % 5]} number {i // 2} do?",
            "completion": f"It gives the {kinds[i % 5]} {i // 2} back, then goes on. "
            * (1 + i % 3),
        }
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(name, folder, *more):
    control = {"full": "control.steps=2"}.get(name, "control_recovered.steps=2")
    settings = [f"chats.path={write_rows(folder)}", *FEW, control, *more]
    model = [s for s in SMALL if s.startswith("model.") and name != "compress_model"]
    return apply_overrides(load_recipe(name), [*settings, *model])


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


def page(result):
    return result.report.read_text()


def test_compress_gives_a_smaller_model_that_stock_classes_load(store, tmp_path):
    result = run_recipe(small("compress", tmp_path), store, threads=1)
    table = store.table(result.manifests["export"].key)
    model = AutoModelForCausalLM.from_pretrained(model_folder(table)).eval()
    dense = AutoModelForCausalLM.from_pretrained(
        model_folder(store.table(result.manifests["model"].key))
    )
    assert model.num_parameters() < dense.num_parameters()
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made.shape[1] <= 7
    judged = {row["role"]: row for row in result.models()["verdict"]}
    assert judged["compressed"]["verdict"] == "accepted"
    assert judged["compressed"]["file_bytes"] < judged["dense"]["file_bytes"]
    assert set(judged) == {"dense", "compressed", "control"}
    assert any("perplexity" in line for line in result.lines())
    assert "flap" in page(result)


@pytest.mark.parametrize("method", ["sparsegpt"])
def test_another_method_by_one_setting(store, tmp_path, method):
    recipe = small(
        "compress", tmp_path, f"plan.method={method}", "control_plan.method=random_weights"
    )
    result = run_recipe(recipe, store, threads=1)
    judged = {row["role"]: row for row in result.models()["verdict"]}
    assert 0.2 < judged["compressed"]["zero_share"] < 0.3


def test_full_tells_from_a_dropped_sample_to_the_last_perplexity(store, tmp_path):
    result = run_recipe(small("full", tmp_path, "signals.rows_a_shard=40"), store, threads=1)
    text = page(result)
    assert "near_duplicate" in text and "selected" in text
    lineage = {m.step for m in store.lineage(result.manifests["report"].key)}
    assert {"read_chats", "embed", "prune_sft", "compress_weights", "compensate_weights"} <= lineage
    kept = store.table(result.manifests["selected"].key).to_table(columns=["id", "keep"])
    dropped = {row["id"] for row in kept.to_pylist() if not row["keep"]}
    rows = store.table(result.manifests["calibration"].key).to_table().to_pylist()
    assert dropped and not dropped & {one for row in rows for one in row["sources"]}
    again = run_recipe(small("full", tmp_path, "signals.rows_a_shard=40"), store, threads=1)
    assert {n: m.key for n, m in again.manifests.items()} == {
        n: m.key for n, m in result.manifests.items()
    }
