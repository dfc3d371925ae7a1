import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunery.errors import ModelError
from prunery.pruners.models.block_layouts import set_weight, weight_of
from prunery.pruners.models.streamed_model import StreamedModel

from ...tiny_causal import ARCHITECTURES, saved_model


def ragged_batch():
    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(12)[None, :] < torch.tensor([12, 7, 10])[:, None]
    return ids.where(valid, torch.tensor(2)), valid


def walk(model, ids, valid):
    prepared = model.prepare(ids, valid)
    hidden = prepared.hidden
    for layer in range(model.layers):
        hidden = model.run(model.block(layer), hidden, prepared.calls[layer])
    return model.logits(hidden, ids, valid)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_walk_gives_the_logits_of_the_whole_model(tmp_path, name, attention):
    folder = saved_model(tmp_path, name)
    streamed = StreamedModel(folder, attention=attention)
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    whole = auto.from_pretrained(folder, attn_implementation=attention).eval()
    ids, valid = ragged_batch()
    with torch.no_grad():
        ours = walk(streamed, ids, valid)
        theirs = whole(input_ids=ids, attention_mask=valid.long()).logits
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-4)
    assert ours[valid].std() > 0.1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_is_in_one_block_or_outside(tmp_path, name):
    streamed = StreamedModel(saved_model(tmp_path, name))
    inside = [n for layer in range(streamed.layers) for n in streamed.block_names(layer).values()]
    assert len(set(inside)) == len(inside)
    assert sorted([*inside, *streamed.outside_names()]) == streamed.tensors.names()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrices_are_all_large_weights_but_routers(tmp_path, name):
    streamed = StreamedModel(saved_model(tmp_path, name))
    for layer in range(streamed.layers):
        block = streamed.block(layer)
        named = {f"{matrix.name}.weight" for matrix in streamed.layout.matrices(block)}
        large = {n for n, p in block.named_parameters() if p.dim() == 2}
        routers = {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}
        assert named == large - routers


def test_a_weight_is_seen_as_out_by_in(tmp_path):
    streamed = StreamedModel(saved_model(tmp_path, "gpt2"))
    block = streamed.block(0)
    up = block.get_submodule("mlp.c_fc")
    x = torch.randn(2, 32)
    torch.testing.assert_close(up(x), x @ weight_of(up, streamed.layout).T + up.bias)
    set_weight(up, streamed.layout, weight_of(up, streamed.layout)[:100].clone())
    up.bias = torch.nn.Parameter(up.bias[:100])
    assert up(x).shape == (2, 100)


def test_blocks_are_separate_copies(tmp_path):
    streamed = StreamedModel(saved_model(tmp_path, "llama"))
    one, other = streamed.block(0), streamed.block(0)
    one.get_submodule("mlp.up_proj").weight.data.zero_()
    assert other.get_submodule("mlp.up_proj").weight.abs().sum() > 0


def test_gradients_flow_through_the_output_layer(tmp_path):
    streamed = StreamedModel(saved_model(tmp_path, "llama"))
    ids, valid = ragged_batch()
    hidden = streamed.prepare(ids, valid).hidden.requires_grad_(True)
    streamed.logits(hidden, ids, valid).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    folder = saved_model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ModelError, match=r"blocks are known \(llama.*'gemma'"):
        StreamedModel(folder)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path, poison):
    folder = saved_model(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = poison
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    streamed = StreamedModel(folder)
    streamed.block(0)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        streamed.block(1)


def test_a_missing_weight_is_named(tmp_path):
    folder = saved_model(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        StreamedModel(folder).block(1)


def test_preparing_a_batch_runs_no_output_layer(tmp_path, monkeypatch):
    streamed = StreamedModel(saved_model(tmp_path, "llama"))

    def never(self, hidden):
        raise AssertionError("the output layer ran")

    monkeypatch.setattr(type(streamed.model.lm_head), "forward", never)
    ids, valid = ragged_batch()
    assert len(streamed.prepare(ids, valid).calls) == streamed.layers
    with pytest.raises(AssertionError):
        streamed.logits(streamed.prepare(ids, valid).hidden, ids, valid)
