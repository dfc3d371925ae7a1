"""Thresholds in a loaded model: the same as plain masking, by the kernel too."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunery.errors import ModelError
from prunery.pruners.models import sparse_activation
from prunery.pruners.models.block_layouts import layout_of
from prunery.pruners.models.sparse_activation import (
    FILE,
    Site,
    apply_thresholds,
    load_thresholds,
    save_thresholds,
    sites,
)

from ...tiny_causal import tiny_model

GATED = ["llama", "mistral", "qwen2", "qwen3"]


def ids(batch=2, length=9):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(3, 300, (batch, length)))


def logits(model, given):
    with torch.no_grad():
        return model(input_ids=given).logits


def cut(values, threshold):
    """Zero by the definition, not shared with the code."""
    return torch.where(values.abs() > threshold, values, torch.zeros_like(values))


def plain_gate(model, thresholds):
    """CATS by hand: gate_proj's output replaced where its activation is small (silu(0) = 0)."""
    for layer, block in enumerate(model.model.layers):
        value = thresholds[layer, Site("mlp.gate_proj", "gate")]

        def hook(module, args, out, value=value):
            return torch.where(torch.nn.functional.silu(out).abs() > value, out, 0.0)

        block.mlp.gate_proj.register_forward_hook(hook)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("per_neuron", [False, True])
def test_gate_thresholds_equal_plain_masking(name, per_neuron):
    torch.manual_seed(0)
    shape = (64,) if per_neuron else ()
    thresholds = {
        (layer, Site("mlp.gate_proj", "gate")): 0.3 * torch.rand(shape) for layer in range(3)
    }
    model, plain = tiny_model(name), tiny_model(name)
    dense = logits(model, ids())
    plain_gate(plain, thresholds)
    with apply_thresholds(model, thresholds):
        found = logits(model, ids())
        decoded = logits(model, ids(1, 3))  # few rows: by the kernel
    torch.testing.assert_close(found, logits(plain, ids()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded, logits(plain, ids(1, 3)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)
    assert torch.equal(logits(model, ids()), dense)
    assert all(block.mlp.down_proj.weight.is_contiguous() for block in model.model.layers)


ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_input_thresholds_equal_plain_masking(name):
    model, plain = tiny_model(name), tiny_model(name)
    layout = layout_of(model.config)
    blocks = plain.get_submodule(layout.blocks)
    thresholds = {}
    for layer, block in enumerate(blocks):
        for number, site in enumerate(sites(block, layout)):
            value = torch.tensor(0.05 * (1 + number))
            thresholds[layer, site] = value
            for matrix in layout.matrices(block):
                if layout.input_of(matrix) == site.module:
                    block.get_submodule(matrix.name).register_forward_pre_hook(
                        lambda m, args, value=value: (cut(args[0], value),)
                    )
    with apply_thresholds(model, thresholds):
        torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), rtol=1e-4, atol=1e-4)
        few = ids(1, 2)
        torch.testing.assert_close(logits(model, few), logits(plain, few), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, ids()), logits(plain, ids()), atol=1e-2)


@pytest.mark.parametrize("kind", ["gate", "input"])
def test_decoding_goes_through_the_kernel_and_says_the_same(kind, monkeypatch):
    calls = []
    real = sparse_activation.sparse_gated_mlp

    def spy(*args, **kwargs):
        calls.append((len(args[0]), kwargs["rule"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(sparse_activation, "sparse_gated_mlp", spy)
    module = "mlp.gate_proj" if kind == "gate" else "mlp.down_proj"
    thresholds = {(layer, Site(module, kind)): torch.full((64,), 0.2) for layer in range(3)}
    said = []
    for kernel in (True, False):
        model = tiny_model("llama")
        with apply_thresholds(model, thresholds, kernel=kernel), torch.no_grad():
            made = model.generate(
                ids(1, 6), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2
            )
        said.append(made.tolist())
        assert bool(calls) == kernel
        assert all(
            rows == 1 and rule == {"gate": "gate", "input": "product"}[kind] for rows, rule in calls
        )
        calls.clear()
    assert said[0] == said[1]


def test_gradients_are_those_of_masking():
    model = tiny_model("llama")
    thresholds = {(0, Site("mlp.gate_proj", "gate")): torch.tensor(0.2)}
    with apply_thresholds(model, thresholds):
        model(input_ids=ids(1, 3), labels=ids(1, 3)).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_nan_lives():
    value = torch.tensor([[float("nan"), 0.1, 3.0]])
    made = sparse_activation.masked(value, torch.tensor(1.0))
    assert torch.isnan(made[0, 0]) and made[0, 1:].tolist() == [0.0, 3.0]


def test_saved_thresholds_come_back(tmp_path):
    thresholds = {
        (0, Site("mlp.gate_proj", "gate")): torch.rand(64),
        (2, Site("self_attn.q_proj", "input")): torch.tensor(0.25),
    }
    assert save_thresholds(tmp_path, thresholds) == tmp_path / FILE
    found = load_thresholds(tmp_path)
    assert found.keys() == thresholds.keys()
    assert all(torch.equal(found[key], thresholds[key]) for key in found)


@pytest.mark.parametrize("names", [["nonsense"], ["0/mlp.gate_proj/other"], None])
def test_a_file_of_something_else_is_refused(tmp_path, names):
    if names:
        save_file({name: torch.zeros(1) for name in names}, tmp_path / FILE)
    with pytest.raises(ModelError, match="expected activation thresholds"):
        load_thresholds(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("llama", (3, Site("mlp.gate_proj", "gate")), torch.tensor(0.1), "layer 3"),
        ("llama", (0, Site("mlp.fc", "input")), torch.tensor(0.1), "mlp.fc"),
        ("llama", (1, Site("mlp.gate_proj", "gate")), torch.zeros(5), "layer 1"),
        ("llama", (1, Site("mlp.gate_proj", "gate")), torch.tensor(-1.0), "at least 0"),
        ("gpt2", (0, Site("mlp.c_fc", "gate")), torch.tensor(0.1), "gated"),
        ("mixtral", (0, Site("self_attn.q_proj", "input")), torch.tensor(0.1), "experts"),
    ],
)
def test_thresholds_of_another_model_are_refused_and_leave_it_dense(name, key, value, says):
    model = tiny_model(name)
    dense = logits(model, ids())
    good = {} if name != "llama" else {(0, Site("self_attn.q_proj", "input")): torch.tensor(9.0)}
    with pytest.raises(ModelError, match=says):
        apply_thresholds(model, {**good, key: value})
    assert torch.equal(logits(model, ids()), dense)


def test_a_model_is_saved_as_it_was_while_thresholds_are_in_force(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    thresholds = {(1, Site("mlp.gate_proj", "gate")): torch.tensor(0.2)}
    with apply_thresholds(model, thresholds):
        model.save_pretrained(tmp_path / "sparse")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
