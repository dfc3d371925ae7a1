"""The step `compensate_weights`: afterwards is the same as at once, on the dense model's sums."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError
from prunery.pipelines.compression.model_tables import model_folder
from prunery.storage import Store

from ...tiny_causal import saved_model
from .stage import calibration, run


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


class Stage:
    """Rows, statistics and a plan for one model."""

    def __init__(self, store, folder, **plan):
        self.store, self.model = store, str(folder)
        self.rows = calibration(store)
        self.statistics = run(
            store,
            "weight_statistics",
            "statistics",
            {"rows": self.rows},
            model=self.model,
            statistics=["m2", "mean", "gram"],
        ).key
        options = {"method": "flap", "sparsity": 0.5, **plan}
        self.plan = run(
            store,
            "plan_compression",
            "plan",
            {"statistics": self.statistics},
            model=self.model,
            **options,
        ).key

    def compress(self, **options):
        return run(
            self.store,
            "compress_weights",
            "small",
            {"plan": self.plan, "rows": self.rows},
            model=self.model,
            **options,
        )

    def compensate(self, table, **options):
        inputs = {"model": table.key, "statistics": self.statistics}
        return run(self.store, "compensate_weights", "mended", inputs, **options)


def logits(store, manifest):
    folder = model_folder(store.table(manifest.key))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "auto"), ("llama", "refit"), ("gpt2", "auto"), ("qwen3", "auto")]
)
def test_afterwards_is_the_same_as_at_once(store, tmp_path, name, how):
    stage = Stage(store, saved_model(tmp_path, name))
    at_once = stage.compress(propagate="dense", compensate=how)
    plain = stage.compress(propagate="dense", compensate="none")
    after = stage.compensate(plain, model=stage.model, compensate=how)
    torch.testing.assert_close(logits(store, at_once), logits(store, after), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(store, plain), logits(store, after), atol=1e-2)
    rows = store.table(after.key).to_table().to_pylist()
    removed = [row for row in rows if row["kept"] < row["total"]]
    assert removed
    assert all("compensated" in row["note"] and row["error"] is not None for row in removed)
    assert after.models["model"] == plain.models["model"]


def test_what_it_cannot_do_is_refused(store, tmp_path):
    stage = Stage(store, saved_model(tmp_path, "llama"), parts=["mlp"])
    made = stage.compress(compensate="bias")
    with pytest.raises(InputError, match=r"layer 0 mlp.*no compensation yet"):
        stage.compensate(made, model=stage.model)
    other = saved_model(tmp_path / "other", "llama", seed=3)
    with pytest.raises(InputError, match="Give the dense model that both were made from"):
        stage.compensate(made, model=str(other))


def test_a_bias_that_cannot_be_leaves_nothing_behind(store, tmp_path):
    stage = Stage(store, saved_model(tmp_path, "qwen2"))
    made = stage.compress()
    with pytest.raises(InputError, match=r"layer 0 .*qwen2.*compensate: refit"):
        stage.compensate(made, model=stage.model, compensate="bias")
    with pytest.raises(Exception, match="mended"):
        store.table("mended")


@pytest.mark.parametrize("how", ["bias", "refit"])
def test_single_weights_are_not_its_business(store, tmp_path, how):
    stage = Stage(store, saved_model(tmp_path, "llama"), method="magnitude")
    with pytest.raises(InputError, match="found none removed"):
        stage.compensate(stage.compress(), model=stage.model, compensate=how)


def test_by_default_a_model_without_removed_groups_is_handed_on(store, tmp_path):
    stage = Stage(store, saved_model(tmp_path, "llama"), method="magnitude")
    before = stage.compress()
    after = stage.compensate(before, model=stage.model)
    assert [(item["name"], item["sha256"]) for item in after.attachments] == [
        (item["name"], item["sha256"]) for item in before.attachments
    ]
    assert store.table(after.key).to_table().equals(store.table(before.key).to_table())
