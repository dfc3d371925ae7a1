"""FLAP end to end, compensation, and what a compressor asks for and refuses."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from prunery.errors import InputError
from prunery.pipelines.compression.groups import (
    ExpertCompressor,
    ExpertOptions,
    GroupCompressor,
    GroupOptions,
)

from ...tiny_causal import saved_model
from .groups_of import blocks_of, compressed, load, logits_of, plan_row, token_rows

LAYERS = range(3)


def plan_of(heads=1, neurons=40, kv=2, width=64):
    rows = []
    for layer in LAYERS:
        if heads is not None:
            rows.append(plan_row(layer, "attention", "head", kv, heads))
        if neurons is not None:
            rows.append(plan_row(layer, "mlp", "neuron", width, neurons))
    return rows


class Reference:
    """FLAP on the stock model in float64: hooks alone, layer after layer.

    A removed channel is silenced where the matrix reads it, and the mean of what it added is
    added to the matrix's output.
    """

    def __init__(self, folder, rows):
        self.model, self.rows = load(folder).double(), rows
        config = self.model.config
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.size = config.head_dim
        self.layers = self.model.model.layers
        self.kept = []

    def inputs(self, module):
        seen = []
        hook = module.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).numpy())
        )
        logits_of(self.model, self.rows)
        hook.remove()
        return np.concatenate(seen)

    def remove(self, module, x, gone, bias):
        w = module.weight.detach().numpy()
        shift = torch.from_numpy(w[:, gone] @ x[:, gone].mean(0)) if bias else 0.0

        def before(_, args):
            hidden = args[0].clone()
            hidden[..., gone] = 0
            return (hidden,)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(lambda _, args, out: out + shift)

    def run(self, heads, neurons, bias):
        """Keep the best `heads` groups and `neurons` of every layer."""
        wide = self.heads // self.kv * self.size
        for layer in self.layers:
            attention, down = layer.self_attn.o_proj, layer.mlp.down_proj
            # Both halves are scored before either is changed.
            both = [(attention, self.inputs(attention), wide, heads, 2)]
            both.append((down, self.inputs(down), 1, neurons, 1))
            for module, x, group, keep, power in both:
                w = module.weight.detach().numpy()
                metric = (x.var(0) * (w**2).sum(0)) ** power
                z = (metric - metric.mean()) / metric.std(ddof=1)
                score = z.reshape(-1, group).mean(1)
                best = np.sort(np.argsort(-score, kind="stable")[:keep])
                channels = (best[:, None] * group + np.arange(group)).reshape(-1)
                gone = np.setdiff1d(np.arange(x.shape[1]), channels)
                self.kept.append(best.tolist())
                self.remove(module, x, gone, bias)
        return logits_of(self.model, self.rows)


@pytest.mark.parametrize("compensate", ["none", "bias"])
def test_flap_end_to_end_equals_hooks_on_the_whole_model(tmp_path, compensate):
    folder, rows = saved_model(tmp_path, "llama", head_dim=8), token_rows(count=9)
    plan = plan_of()
    made = GroupCompressor(
        AutoConfig.from_pretrained(folder), plan, GroupOptions(compensate=compensate)
    )
    out, done = compressed(folder, made, plan, tmp_path, rows=rows)
    reference = Reference(folder, rows)
    expected = reference.run(1, 40, compensate == "bias")
    assert [row["positions"] for row in done] == reference.kept
    smaller = load(out)
    assert smaller.config.attention_bias == smaller.config.mlp_bias == (compensate == "bias")
    for found, wanted in zip(logits_of(smaller, rows), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def outputs(folder, layer, path, rows):
    """What a matrix of a model gives for the rows, each as it is in that model."""
    model, seen = load(folder), []
    module = model.model.layers[layer].get_submodule(path)
    module.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    logits_of(model, rows)
    return torch.cat(seen)


@pytest.mark.parametrize(
    "method", ["flap", "wanda_sp", "cfsp", "magnitude_groups", "random_groups"]
)
def test_refit_is_no_worse_than_bias_and_bias_than_nothing(tmp_path, method):
    """Output error of the first layer's feed-forward part, whose inputs are the same for all."""
    folder, rows = saved_model(tmp_path, "llama"), token_rows(count=20)
    before, errors = outputs(folder, 0, "mlp.down_proj", rows), {}
    plan = plan_of(heads=None, neurons=32)
    for how in ("none", "bias", "refit"):
        work = tmp_path / how
        work.mkdir()
        options = GroupOptions(method=method, compensate=how, damp=1e-4, measure=True)
        made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, options)
        out, done = compressed(folder, made, plan, work, rows=rows)
        after = outputs(out, 0, "mlp.down_proj", rows)
        errors[how] = float((after - before).norm() / before.norm())
        assert done[0]["error"] == pytest.approx(errors[how], rel=2e-2)
        assert done[0]["note"] == ("" if how == "none" else f"compensated: {how}")
    assert errors["refit"] < errors["bias"] < errors["none"]


def test_refit_at_full_width_writes_the_kept_columns(tmp_path):
    """Cut or zeroed: the same function after a refit."""
    folder, found = saved_model(tmp_path, "llama"), []
    plan = plan_of()
    for widths in ("uniform", "padded", "masked"):
        work = tmp_path / widths
        work.mkdir()
        options = GroupOptions(compensate="refit", widths=widths)
        made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, options)
        out, _ = compressed(folder, made, plan, work)
        found.append(torch.cat(logits_of(load(out))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)


def parameters(folder, layout_path, head="causal"):
    blocks = load(folder, head).get_submodule(layout_path)
    return [dict(block.named_parameters()) for block in blocks]


def test_a_switch_of_biases_gives_zeros_to_all_other_matrices_of_all_layers(tmp_path):
    folder = saved_model(tmp_path, "llama")
    plan = [plan_row(layer, "mlp", "neuron", 64, 40 if layer == 1 else 64) for layer in LAYERS]
    options = GroupOptions(compensate="auto", widths="padded")
    made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, options)
    assert made.config() == {"mlp_bias": True}
    out, _ = compressed(folder, made, plan, tmp_path)
    for layer, found in enumerate(parameters(out, "model.layers")):
        assert "self_attn.o_proj.bias" not in found
        assert not found["mlp.gate_proj.bias"].any()
        assert not found["mlp.up_proj.bias"].any()
        assert bool(found["mlp.down_proj.bias"].any()) == (layer == 1)


def test_one_switch_for_both_halves(tmp_path):
    """OPT without biases has one switch for all six matrices."""
    folder = saved_model(tmp_path, "opt", enable_bias=False)
    plan = plan_of(heads=None)
    options = GroupOptions(compensate="bias")
    made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, options)
    assert made.config() == {"ffn_dim": 40, "enable_bias": True}
    out, _ = compressed(folder, made, plan, tmp_path)
    found = parameters(out, "model.decoder.layers")[0]
    assert found["fc2.bias"].any()
    assert not any(found[f"{name}.bias"].any() for name in ("fc1", "self_attn.out_proj"))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_a_bias_that_is_there_takes_the_mean_up(tmp_path, name):
    """The mean output of a compensated matrix is that of the dense one."""
    width = 128 if name == "gpt2" else 64
    folder = saved_model(tmp_path, name)
    head = "masked" if name == "bert" else "causal"
    config = AutoConfig.from_pretrained(folder)
    plan = plan_of(heads=3, neurons=40, kv=4, width=width)
    plan = [row for row in plan if row["layer"] == 0] + [
        plan_row(k, "mlp", "neuron", width, 40) for k in (1, 2)
    ]
    rows, means, layout = token_rows(), [], None
    made = GroupCompressor(config, plan, GroupOptions(compensate="bias"))
    layout = made.layout
    out, done = compressed(folder, made, plan, tmp_path, rows=rows)
    for one in (folder, out):
        model, seen = load(one, head), []
        module = blocks_of(model, layout)[0].get_submodule(layout.output)
        module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out[0]))
        logits_of(model, rows)
        means.append(torch.cat(seen).mean(0))
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)
    assert "heads are zeros at full width" in done[0]["note"]


def test_auto_takes_a_refit_where_there_is_no_bias(tmp_path):
    folder = saved_model(tmp_path, "qwen3")
    plan = plan_of()
    options = GroupOptions(compensate="auto")
    made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, options)
    assert made.wanted == {"m2", "mean", "gram"}
    out, done = compressed(folder, made, plan, tmp_path)
    assert [row["note"] for row in done[:2]] == ["compensated: bias", "compensated: refit"]
    assert load(out).config.attention_bias


def test_a_bias_that_cannot_be_is_refused_by_layer(tmp_path):
    config = AutoConfig.from_pretrained(saved_model(tmp_path, "qwen2"))
    with pytest.raises(InputError, match=r"layer 0 attention.*qwen2.*compensate: refit"):
        GroupCompressor(config, plan_of(), GroupOptions(compensate="bias"))
    config = AutoConfig.from_pretrained(saved_model(tmp_path, "qwen3"))
    with pytest.raises(InputError, match=r"layer 0 mlp"):
        GroupCompressor(config, plan_of(), GroupOptions(compensate="bias"))


def test_a_model_that_becomes_a_mistral_is_refitted(tmp_path):
    folder = saved_model(tmp_path, "llama", num_attention_heads=8, num_key_value_heads=8)
    config = AutoConfig.from_pretrained(folder)
    plan = plan_of(heads=5, neurons=None, kv=8)
    made = GroupCompressor(config, plan, GroupOptions(compensate="auto", convert=True))
    out, done = compressed(folder, made, plan, tmp_path)
    assert load(out).config.num_attention_heads == 5
    assert done[0]["note"] == "compensated: refit"
    kept = GroupCompressor(config, plan, GroupOptions(compensate="bias", convert=True))
    assert "model_type" not in kept.config()


def test_nothing_is_asked_for_where_nothing_goes(tmp_path):
    folder = saved_model(tmp_path, "llama")
    config = AutoConfig.from_pretrained(folder)
    plan = plan_of(heads=2, neurons=64)
    made = GroupCompressor(config, plan, GroupOptions(compensate="auto", measure=True))
    assert made.wanted == frozenset()
    assert made.config() == {}
    out, done = compressed(folder, made, plan, tmp_path)
    assert all(row["kept"] == row["total"] and row["error"] is None for row in done)
    assert torch.equal(torch.cat(logits_of(load(out))), torch.cat(logits_of(load(folder))))


def test_a_half_that_the_method_does_not_score_is_refused(tmp_path):
    folder = saved_model(tmp_path, "llama")
    plan = plan_of()
    made = GroupCompressor(AutoConfig.from_pretrained(folder), plan, GroupOptions(method="cfsp"))
    with pytest.raises(InputError, match=r"layer 0 attention: expected scores.*cfsp"):
        compressed(folder, made, plan, tmp_path)


def test_experts_are_chosen_by_score(tmp_path):
    folder = saved_model(tmp_path, "mixtral")
    config = AutoConfig.from_pretrained(folder)
    plan = [plan_row(k, "experts", "expert", 4, 2) for k in LAYERS]
    tokens = torch.tensor([[5, 1, 7, 2], [1, 2, 3, 4], [4, 3, 2, 1]])
    tables = {
        layer: {
            ("mlp.experts", "expert_tokens"): tokens[layer],
            ("mlp.experts", "expert_gate"): tokens[layer].double(),
        }
        for layer in LAYERS
    }
    made = ExpertCompressor(config, plan, ExpertOptions(method="expert_frequency"))
    assert made.wanted == {"expert_tokens", "expert_gate"}
    out, done = compressed(folder, made, plan, tmp_path, tables=tables)
    assert [row["positions"] for row in done] == [[0, 2], [2, 3], [0, 1]]
    assert load(out).config.num_local_experts == 2


@pytest.mark.parametrize("method", ["reap", "easy_ep", "expert_frequency", "random_experts"])
def test_expert_methods_run_from_text_to_a_smaller_model(tmp_path, method):
    folder = saved_model(tmp_path, "qwen3_moe")
    config = AutoConfig.from_pretrained(folder)
    plan = [plan_row(k, "experts", "expert", 4, 3) for k in LAYERS]
    made = ExpertCompressor(config, plan, ExpertOptions(method=method))
    out, done = compressed(folder, made, plan, tmp_path)
    model = load(out)
    assert all(len(row["positions"]) == 3 for row in done)
    prompt = torch.tensor([[5, 6, 7]])
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
