import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pipelines.compression import recovery
from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from ...tiny_causal import saved_model
from .recovery_models import model_table, pattern_rows, pruned_model, rows_table

FAST = {"steps": 6, "batch_tokens": 64, "rank": 4, "evaluations": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    rows_table(made, pattern_rows())
    return made


def call(step, store, inputs, **options):
    spec = STEPS[step]
    return spec(spec.options(**options), inputs, StepContext(store, step, threads=1))


def recovered(store, model="small", inputs=None, **options):
    inputs = {"model": model, "rows": "rows", **(inputs or {})}
    return call("recover_weights", store, inputs, **(FAST | options))


def weights(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_a_recovered_table_loads_and_says_what_was_won(store, tmp_path):
    source = pruned_model(tmp_path, "llama")
    model_table(store, source)
    made = recovered(store)
    told = made.notes["recovery"]
    assert told["held_out_after"]["nll"] < told["held_out_before"]["nll"]
    assert told["steps"] == 6 and 0 < told["share_trained"] < 1
    assert told["rows_held_out"] == 3 and told["rows_trained"] == 21
    folder = model_folder(store.table("recover_weights"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    old, new = weights(source), weights(folder)
    assert old.keys() == new.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(old[name] == 0, new[name] == 0) and not torch.equal(old[name], new[name])
    assert torch.equal(loaded.state_dict()[name], new[name])
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    [row] = store.table("recover_weights").to_table().to_pylist()
    assert row["kept"] == 5 and row["error"] == 0.25
    assert row["note"] == "recovered by mask_lora; the error is from before"
    again = recovered(store)
    assert again.key == made.key


def test_a_stopped_run_leaves_nothing_and_the_next_has_the_same_bytes(store, tmp_path, monkeypatch):
    model_table(store, pruned_model(tmp_path, "llama"))
    other = Store(tmp_path / "other")
    rows_table(other, pattern_rows())
    model_table(other, pruned_model(tmp_path / "same", "llama"))
    wanted = recovered(other)

    real, calls = recovery.evaluate, []

    def killed(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(recovery, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        recovered(store)
    assert not store.exists(wanted.key)
    monkeypatch.undo()
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    made = recovered(store)
    assert made.key == wanted.key
    digests = [{item["name"]: item["sha256"] for item in m.attachments} for m in (made, wanted)]
    assert digests[0] == digests[1]


def test_no_better_model_is_the_input_again(store, tmp_path, monkeypatch):
    model_table(store, pruned_model(tmp_path, "llama"))
    monkeypatch.setattr(recovery, "rate", lambda step, steps: 0.0)
    made = recovered(store)
    assert made.notes["recovery"]["given_back"]
    given = {item["name"]: item["sha256"] for item in store.manifest("small").attachments}
    assert {item["name"]: item["sha256"] for item in made.attachments} == given
    [row] = store.table("recover_weights").to_table().to_pylist()
    assert row["note"] == "mask_lora: no better on held-out rows, given back as it was"


def test_codes_are_carried_over_and_their_weights_stay(store, tmp_path):
    source = pruned_model(tmp_path, "llama")
    name = "model.layers.0.mlp.down_proj"
    save_file(
        {f"{name}.codes": torch.ones(2, 2, dtype=torch.int8), f"{name}.scale": torch.ones(2, 1)},
        source / "codes-00000.safetensors",
    )
    model_table(store, source, bits=4)
    made = recovered(store)
    folder = model_folder(store.table(made.key))
    codes = "codes-00000.safetensors"
    assert (folder / codes).read_bytes() == (source / codes).read_bytes()
    old, new = weights(source), weights(folder)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert f"{name}.weight" not in changed and "model.layers.0.mlp.up_proj.weight" in changed


def test_bits_without_codes_are_refused(store, tmp_path):
    model_table(store, pruned_model(tmp_path, "llama"), bits=4)
    with pytest.raises(InputError, match="expected the codes of its quantised weights"):
        recovered(store)


def test_distilling_brings_the_model_nearer_to_its_teacher(store, tmp_path):
    dense = saved_model(tmp_path / "dense", "llama")
    model_table(store, pruned_model(tmp_path, "llama", share=0.3))
    call("teacher_logits", store, {"rows": "rows"}, model=str(dense), k=32, device="cpu")
    made = recovered(
        store,
        inputs={"teacher": "teacher_logits"},
        method="distil",
        distil_weight=1.0,
        temperature=2.0,
        steps=20,
    )
    told = made.notes["recovery"]
    before, after = (told[f"held_out_{when}"]["divergence"] for when in ("before", "after"))
    assert after < 0.9 * before
    # Against the whole distributions of both models, on the held-out and trained rows alike.
    teacher = AutoModelForCausalLM.from_pretrained(dense).eval()
    apart = []
    for table in ("small", "recover_weights"):
        student = AutoModelForCausalLM.from_pretrained(model_folder(store.table(table))).eval()
        total = 0.0
        for tokens in pattern_rows().input_ids:
            ids = torch.from_numpy(tokens)[None]
            with torch.no_grad():
                p, q = (m(ids).logits[0].double().log_softmax(1) for m in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
        apart.append(total)
    assert apart[1] < apart[0]


def test_layerwise_takes_the_dense_model_by_option(store, tmp_path):
    dense = saved_model(tmp_path / "dense", "gpt2")
    model_table(store, pruned_model(tmp_path, "gpt2"))
    made = recovered(store, method="layerwise", dense=str(dense), steps=4)
    assert len(made.notes["recovery"]["layers"]) == 3
    assert "dense" in made.models
    assert not list((tmp_path / "cache" / "compression").glob("*"))


def test_masked_models_need_a_mask_token(store, tmp_path):
    source = pruned_model(tmp_path, "bert")
    model_table(store, source, name="without")
    with pytest.raises(InputError, match="expected a tokenizer with a mask token"):
        recovered(store, "without", method="bias_norm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.mask_token = "<|im_end|>"
    tokenizer.save_pretrained(source)
    model_table(store, source, name="with")
    made = recovered(store, "with", method="bias_norm", steps=15)
    assert not made.notes["recovery"]["given_back"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"method": "distil"}, "found method distil without it"),
        ({"method": "layerwise"}, "found method layerwise without it"),
        ({"method": "lora", "dense": "somewhere"}, "found method lora with it"),
        ({"method": "mask_lora", "keep_zeros": False}, "mask_lora leaves zeros at zero"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_runs(store, tmp_path, options, found):
    model_table(store, pruned_model(tmp_path, "llama"))
    with pytest.raises(RecipeError, match=found):
        recovered(store, **options)


def test_rows_of_another_tokenizer_are_refused(store, tmp_path):
    model_table(store, pruned_model(tmp_path, "llama"))
    rows_table(store, pattern_rows(), name="foreign", models={"tokenizer": "f" * 64})
    with pytest.raises(InputError, match="was made with the tokenizer ffff"):
        recovered(store, inputs={"rows": "foreign"})


def test_too_few_rows_and_a_weight_that_is_no_number_leave_the_source_as_it_was(store, tmp_path):
    source = pruned_model(tmp_path, "llama")
    model_table(store, source)
    rows_table(store, pattern_rows(8), name="few")
    with pytest.raises(InputError, match="`few`: expected at least 10 rows .* found 8"):
        recovered(store, inputs={"rows": "few"})
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    model_table(store, source, name="broken")
    before = json.dumps(store.manifest("broken").attachments)
    with pytest.raises(ModelError, match="found a NaN or an infinity in model.layers.1.mlp.up_pro"):
        recovered(store, "broken")
    assert json.dumps(store.manifest("broken").attachments) == before
