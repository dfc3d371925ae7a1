"""Causal models: found, digested, loaded whole or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from prunery.errors import ModelError
from prunery.pipelines.train_lm import train_tokenizer
from prunery.pruners.models import causal
from prunery.pruners.models.causal import load_causal, resolve_causal


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer."""
    tokenizer = train_tokenizer(["some words and some more words"], 300)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_what_is_loaded_is_what_was_resolved(folder):
    found, loaded = resolve_causal(str(folder)), load_causal(str(folder), device="cpu")
    assert loaded.path == found.path == folder
    assert (loaded.digest, loaded.tokenizer_sha256, loaded.template_sha256) == (
        found.sha256,
        found.tokenizer_sha256,
        found.template_sha256,
    )
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    weights = load_file(folder / "model.safetensors")
    torch.testing.assert_close(
        loaded.model.model.embed_tokens.weight, weights["model.embed_tokens.weight"]
    )
    low = load_causal(str(folder), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}


def test_the_digest_sees_weights_configuration_tokenizer_and_template(folder):
    before = resolve_causal(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    other = resolve_causal(str(folder))
    assert other.sha256 != before.sha256
    assert other.tokenizer_sha256 == before.tokenizer_sha256
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    third = resolve_causal(str(folder))
    assert third.template_sha256 != other.template_sha256
    assert third.sha256 == other.sha256
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve_causal(str(folder)).sha256 != third.sha256


def test_a_weight_that_is_missing_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal(str(folder))


def test_pickled_weights_and_broken_files_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_causal(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        load_causal(str(folder))


def test_adapters_alone_are_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="adapters alone"):
        resolve_causal(str(folder))


def test_what_cannot_be_found_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_causal("nobody/no-such-model-of-prunery")


def test_the_hub_is_asked_for_templates_and_no_code(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, *, allow_patterns: asked.extend(allow_patterns) or str(folder),
    )
    assert resolve_causal("owner/model").path == folder
    assert {"*.safetensors", "*.jinja", "*.json"} <= set(asked)
    assert not any(p.endswith((".bin", ".pt", ".py", ".pkl", "*")) for p in asked)


def test_where_a_text_without_a_prompt_starts(folder):
    loaded = load_causal(str(folder))
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.start) == "<|endoftext|>"
    loaded.tokenizer.bos_token = None
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.start) == "<|im_end|>"
    loaded.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="begin- or end-of-sequence"):
        _ = loaded.start
    assert causal.LoadedCausal.__dataclass_params__.frozen
