"""What comes out loads with stock transformers, is as sparse as planned, and outlives a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunery.errors import InputError, RecipeError
from prunery.pipelines.compression.model_tables import model_folder
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.storage import Store

from ...tiny_causal import ARCHITECTURES, saved_model
from .stage import calibration, run


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


def compress(store, folder, *, plan=None, statistics=None, **options):
    """Folder and table of a model compressed by one plan."""
    model = str(folder)
    rows = calibration(store)
    inputs, more = {}, {}
    if statistics:
        made = run(store, "weight_statistics", "statistics", {"rows": rows}, model=model,
                   statistics=statistics)  # fmt: skip
        inputs = {"statistics": made.key}
        more = {"statistics": made.key}
    planned = run(store, "plan_compression", "plan", inputs, model=model, **(plan or {}))
    made = run(
        store, "compress_weights", "small", {"plan": planned.key, "rows": rows, **more},
        model=model, **options,
    )  # fmt: skip
    table = store.table(made.key)
    return model_folder(table), table


def loaded(folder, name):
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model):
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_half_the_weights_go_in_every_architecture(store, tmp_path, name, method):
    source = saved_model(tmp_path, name)
    folder, table = compress(store, source, plan={"method": method, "sparsity": 0.5})
    model = loaded(folder, name)
    assert torch.isfinite(logits(model)).all()
    streamed = StreamedModel(folder)
    for layer in range(streamed.layers):
        block = streamed.block(layer)
        for matrix in streamed.layout.matrices(block):
            weight = block.get_submodule(matrix.name).weight
            share = (weight == 0).float().mean()
            assert abs(float(share) - 0.5) < 0.02, (layer, matrix.name)
    if name != "bert":
        made = model.generate(torch.arange(3, 10)[None], max_new_tokens=4, do_sample=False)
        assert made.shape == (1, 11)
    assert table.manifest.rows == sum(
        len(streamed.layout.matrices(streamed.block(layer))) for layer in range(streamed.layers)
    )


@pytest.mark.parametrize(
    ("plan", "statistics"),
    [
        ({"method": "magnitude"}, None),
        ({"method": "magnitude", "allocation": "global"}, None),
        ({"method": "random_weights", "allocation": "erk"}, None),
        ({"method": "gblm"}, ["gradient_square"]),
        ({"method": "wanda", "allocation": "importance"}, ["angle"]),
        ({"method": "sparsegpt", "pattern": "2:4"}, None),
        ({"method": "wanda", "pattern": "4:8"}, None),
        ({"method": "sparsegpt", "bits": 4, "group_size": 16}, None),
        ({"method": "none", "bits": 3, "group_size": 16, "quantiser": "rtn"}, None),
        ({"method": "none", "bits": 4, "group_size": 16, "quantiser": "gptq"}, None),
        ({"method": "none", "bits": 4, "group_size": 16, "quantiser": "rsq"}, None),
        ({"method": "flap"}, ["m2", "mean"]),
        ({"method": "flap", "allocation": "global"}, ["m2", "mean"]),
        ({"method": "wanda_sp", "widths": "uniform"}, None),
        ({"method": "llm_pruner"}, ["gradient", "gradient_square"]),
        ({"method": "random_groups"}, None),
        ({"method": "cfsp", "parts": ["mlp"]}, None),
        ({"method": "block_influence", "sparsity": 0.3, "tolerance": 0.1}, ["cosine"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_methods_give_models_that_load(store, tmp_path, plan, statistics):
    source = saved_model(tmp_path, "llama", hidden_size=64, num_attention_heads=8,
                         num_key_value_heads=4, intermediate_size=128)  # fmt: skip
    folder, table = compress(store, source, plan=plan, statistics=statistics)
    model = loaded(folder, "llama")
    assert torch.isfinite(logits(model)).all()
    dense = loaded(source, "llama")
    assert not torch.allclose(logits(model), logits(dense))
    parts = sum(p.numel() for p in model.model.layers.parameters())
    if plan["method"] in ("flap", "wanda_sp", "random_groups", "llm_pruner", "block_influence"):
        assert parts < 0.8 * sum(p.numel() for p in dense.model.layers.parameters())
    assert table.manifest.rows > 0


@pytest.mark.parametrize("method", ["easy_ep", "reap", "expert_frequency"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_half_the_experts_go(store, tmp_path, name, method):
    source = saved_model(tmp_path, name, **({"mlp_only_layers": []} if name == "qwen2_moe" else {}))
    folder, _ = compress(store, source, plan={"method": method, "sparsity": 0.5})
    model = loaded(folder, name)
    config = model.config
    assert (config.num_local_experts if name == "mixtral" else config.num_experts) == 2
    assert torch.isfinite(logits(model)).all()


def test_the_same_again_is_the_same_bytes(store, tmp_path):
    source = saved_model(tmp_path, "llama")
    plan = {"method": "sparsegpt"}
    _, table = compress(store, source, plan=plan)
    other = Store(tmp_path / "other")
    _, again = compress(other, source, plan=plan)
    assert table.manifest.logical_digest == again.manifest.logical_digest
    shas = [{a["name"]: a["sha256"] for a in t.manifest.attachments} for t in (table, again)]
    assert shas[0] == shas[1]


KILLED = """
import os, signal, sys
from prunery.pipelines.compression import journal
from prunery.storage import Store
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
record = journal.LayerJournal.record
def record_and_die(self, layer, *args):
    record(self, layer, *args)
    if layer == {layer} and "{when}" == "after":
        os.kill(os.getpid(), signal.SIGKILL)
put = journal.LayerJournal.put_hidden
def put_and_die(self, layer, batch, hidden):
    put(self, layer, batch, hidden)
    if layer == {layer} + 1 and "{when}" == "between":
        os.kill(os.getpid(), signal.SIGKILL)
journal.LayerJournal.record = record_and_die
journal.LayerJournal.put_hidden = put_and_die
spec = STEPS["compress_weights"]
spec(spec.options(model="{model}"), {inputs}, StepContext(Store("{store}"), name="small"))
"""


@pytest.mark.parametrize(("layer", "when"), [(0, "after"), (1, "between"), (2, "after")])
def test_killed_at_a_layer_and_run_again_gives_the_same_bytes(store, tmp_path, layer, when):
    source = str(saved_model(tmp_path, "llama"))
    rows = calibration(store)
    plan = run(store, "plan_compression", "plan", model=source, method="sparsegpt")
    inputs = {"plan": plan.key, "rows": rows}
    program = KILLED.format(
        layer=layer, when=when, model=source, inputs=inputs, store=tmp_path / "store"
    )
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache" / "compression").glob("*/layer-*"))
    made = run(store, "compress_weights", "small", inputs, model=source)
    assert not list((tmp_path / "cache" / "compression").glob("*/layer-*")), "nothing is left"
    other = Store(tmp_path / "other")
    rows = calibration(other)
    plan = run(other, "plan_compression", "plan", model=source, method="sparsegpt")
    whole = run(other, "compress_weights", "small", {"plan": plan.key, "rows": rows}, model=source)
    assert made.logical_digest == whole.logical_digest
    assert made.attachments == whole.attachments


def test_a_dropped_layer_leaves_no_gap(store, tmp_path):
    source = saved_model(tmp_path, "qwen2")
    folder, table = compress(
        store, source, plan={"method": "block_influence", "sparsity": 0.33}, statistics=["cosine"]
    )
    model = loaded(folder, "qwen2")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 == len(model.model.layers)
    assert len(config.get("layer_types", [0, 0])) == 2
    rows = table.to_table().to_pylist()
    assert sorted(row["kept"] for row in rows) == [0, 1, 1]


def test_statistics_over_trained_tokens_alone_differ(store, tmp_path):
    source = saved_model(tmp_path, "llama")
    everything, _ = compress(store, source, plan={"method": "sparsegpt"})
    some, _ = compress(store, source, plan={"method": "sparsegpt"}, tokens="trained")
    assert not torch.equal(logits(loaded(everything, "llama")), logits(loaded(some, "llama")))


def test_another_model_than_the_plans_is_refused(store, tmp_path):
    one = saved_model(tmp_path / "a", "llama")
    other = saved_model(tmp_path / "b", "llama", seed=1)
    plan = run(store, "plan_compression", "plan", model=str(one), method="magnitude")
    with pytest.raises(InputError, match="is a plan for the model"):
        run(store, "compress_weights", "small",
            {"plan": plan.key, "rows": calibration(store)}, model=str(other))  # fmt: skip


def test_gradients_that_were_not_taken_are_asked_for(store, tmp_path):
    source = saved_model(tmp_path, "llama")
    with pytest.raises(RecipeError, match="weight_statistics step"):
        compress(store, source, plan={"method": "gblm"})


def test_the_source_stays_as_it_was(store, tmp_path):
    source = saved_model(tmp_path, "llama_tied")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder, _ = compress(store, source, plan={"method": "wanda"})
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    model = loaded(folder, "llama_tied")
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    dense = loaded(source, "llama_tied")
    assert tied and torch.equal(model.lm_head.weight, dense.lm_head.weight), "it is never pruned"


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, {"method": "sparsegpt"}) for name in ("llama", "gpt2", "bert", "mixtral")),
        ("llama", {"method": "none", "bits": 4, "group_size": 0, "quantiser": "rsq"}),
    ],
)
def test_passes_in_bfloat16_leave_solves_and_weights_alone(store, tmp_path, name, plan):
    """Other inputs by bfloat16's rounding, hence almost the same weights, none of them rounded."""
    source = saved_model(tmp_path, name)
    exact = loaded(compress(store, source, plan=plan)[0], name).state_dict()
    found = loaded(compress(store, source, plan=plan, autocast=True)[0], name).state_dict()
    moved = total = rounded = 0.0
    for key, tensor in exact.items():
        moved += float((found[key] - tensor).square().sum())
        total += float(tensor.square().sum())
        rounded += float((found[key] != found[key].bfloat16()).float().sum())
    assert 0 < moved < 0.05 * total
    assert rounded > 0
