"""Scores of groups against their definitions, in float64, over a whole model with plain hooks."""

import math

import numpy as np
import pytest
import torch

from prunery.errors import InputError
from prunery.pipelines.compression.group_scores import group_scores
from prunery.pipelines.compression.group_signals import layer_signals, statistics_of
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import Signals
from prunery.pruners.models.streamed_model import StreamedModel

from ...tiny_causal import saved_model
from .groups_of import blocks_of, load, token_rows

NAMES = ("llama", "qwen3", "gpt2", "opt", "bert")
LAYER = 1


class Whole:
    """Weights (out, in), inputs and gradients of the matrices of one layer, all in float64."""

    def __init__(self, folder):
        self.streamed = StreamedModel(folder)
        self.config, self.layout = self.streamed.config, self.streamed.layout
        self.model = load(folder, self.layout.head).double()
        self.block = blocks_of(self.model, self.layout)[LAYER]
        self.matrices = self.layout.matrices(self.streamed.empty_block(LAYER))
        self.seen = {matrix.name: [] for matrix in self.matrices}
        self.rows = token_rows()
        hooks = [
            self.block.get_submodule(m.name).register_forward_pre_hook(
                lambda _, args, name=m.name: self.seen[name].append(
                    args[0].detach().reshape(-1, args[0].shape[-1])
                )
            )
            for m in self.matrices
        ]
        with torch.no_grad():
            for row in self.rows:
                self.model(torch.from_numpy(row)[None])
        for hook in hooks:
            hook.remove()

    def weight(self, name):
        weight = self.block.get_submodule(name).weight.detach()
        return (weight.T if self.layout.transposed else weight).numpy()

    def inputs(self, name):
        return torch.cat(self.seen[name]).numpy()

    def gradients(self):
        """Gradient (rows, out, in) of each row's mean next-token loss, by matrix."""
        made = {matrix.name: [] for matrix in self.matrices}
        for row in self.rows:
            self.model.zero_grad()
            ids = torch.from_numpy(row)[None]
            logits = self.model(ids).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
            for name, found in made.items():
                grad = self.block.get_submodule(name).weight.grad
                found.append((grad.T if self.layout.transposed else grad).clone().numpy())
        return {name: np.stack(found) for name, found in made.items()}

    def statistics(self):
        made = {}
        for matrix in self.matrices:
            x, name = self.inputs(matrix.name), self.layout.input_of(matrix)
            made[name, "count"] = torch.tensor(len(x))
            made[name, "sum_squares"] = torch.from_numpy((x**2).sum(0))
            made[name, "mean"] = torch.from_numpy(x.mean(0))
            made[name, "m2"] = torch.from_numpy(((x - x.mean(0)) ** 2).sum(0))
        return made

    def scores(self, method, more=None):
        statistics = self.statistics() | (more or {})
        block = self.streamed.block(LAYER)
        return group_scores(method, block, self.layout, self.config, statistics, LAYER)


@pytest.fixture(scope="module", params=NAMES)
def whole(request, tmp_path_factory):
    return Whole(saved_model(tmp_path_factory.mktemp("model"), request.param))


def groups(whole):
    """Slices of each matrix that go with each key-value group, and with each neuron.

    For each group a list of (name, axis, positions).
    """
    heads, kv, size = whole.layout.sizes(whole.config)
    a_group = heads // kv
    attention = []
    for group in range(kv):
        queries = range(group * a_group * size, (group + 1) * a_group * size)
        keys = range(group * size, (group + 1) * size)
        if whole.layout.fused:
            hidden = heads * size
            parts = [(whole.layout.query, 0, [p + hidden * k for p in keys]) for k in range(3)]
        else:
            parts = [
                (whole.layout.query, 0, list(queries)),
                (whole.layout.key, 0, list(keys)),
                (whole.layout.value, 0, list(keys)),
            ]
        attention.append([*parts, (whole.layout.output, 1, list(queries))])
    neurons = []
    for neuron in range(whole.layout.neurons(whole.config)):
        parts = [(name, 0, [neuron]) for name in (whole.layout.gate, whole.layout.up) if name]
        neurons.append([*parts, (whole.layout.down, 1, [neuron])])
    return {"head": attention, "neuron": neurons}


def check(found, expected, rtol=2e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


def test_costs_are_the_weights_that_go(whole):
    found = whole.scores(METHODS["random_groups"]())
    heads, kv, size = whole.layout.sizes(whole.config)
    hidden, gated = whole.config.hidden_size, whole.layout.gate is not None
    assert set(found["head"][1]) == {(2 * heads // kv + 2) * size * hidden}
    assert set(found["neuron"][1]) == {(3 if gated else 2) * hidden}
    assert len(found["head"][1]) == kv


def test_flap_definition(whole):
    found = whole.scores(METHODS["flap"]())
    for unit, name in (("head", whole.layout.output), ("neuron", whole.layout.down)):
        x, w = whole.inputs(name), whole.weight(name)
        metric = [x[:, j].var() * (w[:, j] ** 2).sum() for j in range(x.shape[1])]
        metric = np.array(metric) ** (2 if unit == "head" else 1)
        z = (metric - metric.mean()) / metric.std(ddof=1)
        expected = [z[parts[-1][2]].mean() for parts in groups(whole)[unit]]
        check(found[unit][0], np.array(expected))


def test_wanda_sp_definition(whole):
    found = whole.scores(METHODS["wanda_sp"]())
    for unit, name in (("head", whole.layout.output), ("neuron", whole.layout.down)):
        x, w = whole.inputs(name), np.abs(whole.weight(name))
        channel = np.sqrt((x**2).mean(0)) * w.mean(0)
        check(found[unit][0], np.array([channel[g[-1][2]].sum() for g in groups(whole)[unit]]))


def test_magnitude_definition(whole):
    found = whole.scores(METHODS["magnitude_groups"]())
    for unit, all_parts in groups(whole).items():
        expected = [
            math.sqrt(sum((whole.weight(n).take(at, axis) ** 2).sum() for n, axis, at in parts))
            for parts in all_parts
        ]
        check(found[unit][0], np.array(expected))


def test_cfsp_definition(whole):
    found = whole.scores(METHODS["cfsp"](inner=0.5, outer=2.0))
    assert set(found) == {"neuron"}
    layout = whole.layout
    loud = np.sqrt((whole.inputs(layout.down) ** 2).mean(0))
    down = np.abs(whole.weight(layout.down)).sum(0) * loud**0.5
    up = np.abs(whole.weight(layout.up)).sum(1)
    share = down / down.sum() + up / up.sum()
    if layout.gate is not None:
        gate = np.abs(whole.weight(layout.gate)).sum(1)
        share += gate / gate.sum()
    check(found["neuron"][0], share * loud**2)


@pytest.mark.parametrize("order", ["vector", "element1", "element2", "mix"])
def test_llm_pruner_definition(whole, order):
    gradients = whole.gradients()
    given = {}
    for name, g in gradients.items():
        given[name, "gradient"] = torch.from_numpy(g.sum(0)).float()
        given[name, "gradient_square"] = torch.from_numpy((g**2).sum(0)).float()
        given[name, "gradient_rows"] = torch.tensor(len(g))
    method = METHODS["llm_pruner"](order=order)
    found = whole.scores(method, given)
    for unit, all_parts in groups(whole).items():
        expected = []
        for parts in all_parts:
            total = 0.0
            for name, axis, at in parts:
                for place in at:
                    w = whole.weight(name).take(place, axis)
                    g = gradients[name].mean(0).take(place, axis)
                    h = (gradients[name] ** 2).mean(0).take(place, axis)
                    total += {
                        "vector": abs((w * g).sum()),
                        "element1": np.abs(w * g).sum(),
                        "element2": (w * w * h).sum(),
                        "mix": np.abs(w * g - w * w * h / 2).sum(),
                    }[order]
            expected.append(total)
        check(found[unit][0], np.array(expected), rtol=1e-3)


def test_grouped_queries_go_with_their_keys(tmp_path):
    """A group whose second query head alone is loud is kept: its heads are not strided."""
    folder = saved_model(tmp_path, "llama")
    model = StreamedModel(folder)
    block = model.block(0)
    statistics = {}
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        size = block.get_submodule(module).weight.shape[1]
        statistics[module, "count"] = torch.tensor(10)
        statistics[module, "m2"] = torch.ones(size, dtype=torch.float64)
        statistics[module, "sum_squares"] = torch.ones(size, dtype=torch.float64)
    for loud, group in ((0, 0), (1, 0), (2, 1), (3, 1)):
        here = {key: value.clone() for key, value in statistics.items()}
        for name in ("m2", "sum_squares"):
            here["self_attn.o_proj", name][loud * 8 : loud * 8 + 8] = 1000
        for name in ("flap", "wanda_sp"):
            found = group_scores(METHODS[name](), block, model.layout, model.config, here, 0)
            assert int(found["head"][0].argmax()) == group


def test_scores_by_layer_are_those_of_the_method_over_all_layers(tmp_path):
    folder = saved_model(tmp_path, "llama")
    model, method = StreamedModel(folder), METHODS["flap"](keep=0.5)
    rng = np.random.default_rng(3)
    scores, parts = [], []
    for layer in range(3):
        block, statistics = model.block(layer), {}
        for module, size in (("self_attn.o_proj", 32), ("mlp.down_proj", 64)):
            statistics[module, "count"] = torch.tensor(10)
            statistics[module, "m2"] = torch.from_numpy(rng.random(size))
        given = (block, model.layout, model.config, statistics, layer)
        found = group_scores(method, *given)
        scores += [found["head"][0], found["neuron"][0]]
        signals = layer_signals(method, *given)
        parts += [signals["head"], signals["neuron"]]
    arrays = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("id", "part", "cost", "channel_variance", "channel_square")
    }
    sizes = np.concatenate([np.diff(part["channel_offset"]) for part in parts])
    offset = np.concatenate([[0], np.cumsum(sizes)])
    whole = method(Signals({**arrays, "channel_offset": offset}), seed=0)
    np.testing.assert_allclose(whole.score, np.concatenate(scores), rtol=1e-6)
    kept = int(arrays["cost"][whole.keep].sum())
    assert 0 <= kept - arrays["cost"].sum() // 2 < arrays["cost"].max()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_and_layers_are_read_from_their_sums(tmp_path, name):
    model = StreamedModel(saved_model(tmp_path, name))
    block = model.block(0)
    statistics = {
        ("mlp.experts", "expert_tokens"): torch.tensor([4, 2, 0, 1]),
        ("mlp.experts", "expert_gate"): torch.tensor([2.0, 1.5, 0, 0.1]).double(),
        ("mlp.experts", "expert_norm"): torch.tensor([8.0, 1, 0, 3]).double(),
        ("mlp.experts", "expert_reap"): torch.tensor([4.0, 1, 0, 3]).double(),
        ("mlp.experts", "expert_easy"): torch.tensor([1.0, 2, 0, 4]).double(),
        ("", "cosine"): torch.tensor(4.0).double(),
        ("", "count"): torch.tensor(5),
    }
    expected = {
        "reap": [1, 0.5, 0, 3],
        "easy_ep": [1, 2, 0, 4],
        "expert_frequency": [4, 2, 0, 1],
    }
    for method, score in expected.items():
        found = group_scores(METHODS[method](), block, model.layout, model.config, statistics, 0)
        assert found["expert"][0].tolist() == score
        width = model.config.to_dict()[model.layout.expert_width]
        assert set(found["expert"][1]) == {3 * 32 * width}
    method = METHODS["block_influence"]()
    found = group_scores(method, block, model.layout, model.config, statistics, 0)
    assert found["layer"][0] == pytest.approx([0.2])
    assert found["layer"][1][0] > 0


def test_units_that_are_not_there_are_left_out(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "qwen2_moe"))
    method = METHODS["magnitude_groups"]()
    given = (model.layout, model.config, {})
    assert set(group_scores(method, model.block(0), *given, 0)) == {"head"}
    assert set(group_scores(method, model.block(1), *given, 1)) == {"head", "neuron"}
    assert group_scores(METHODS["reap"](), model.block(1), *given, 1) == {}


def test_missing_and_broken_statistics_are_named(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    block, method = model.block(2), METHODS["wanda_sp"]()
    with pytest.raises(InputError, match=r"layer 2, self_attn.o_proj.*`sum_squares`"):
        group_scores(method, block, model.layout, model.config, {}, 2)
    squares = torch.ones(32, dtype=torch.float64)
    squares[3] = torch.nan
    broken = {
        ("self_attn.o_proj", "sum_squares"): squares,
        ("self_attn.o_proj", "count"): torch.tensor(3),
    }
    with pytest.raises(InputError, match=r"layer 2, self_attn.o_proj.*NaN"):
        group_scores(method, block, model.layout, model.config, broken, 2)
    none = {**broken, ("self_attn.o_proj", "count"): torch.tensor(0)}
    none["self_attn.o_proj", "sum_squares"] = torch.zeros(32).double()
    with pytest.raises(InputError, match="at least one token"):
        group_scores(method, block, model.layout, model.config, none, 2)


def test_only_the_statistics_that_are_read_are_asked_for():
    assert statistics_of(METHODS["flap"]()) == {"m2"}
    assert statistics_of(METHODS["cfsp"]()) == statistics_of(METHODS["wanda_sp"]())
    assert statistics_of(METHODS["llm_pruner"](order="vector")) == {"gradient"}
    assert statistics_of(METHODS["llm_pruner"](order="mix")) == {"gradient", "gradient_square"}
    assert statistics_of(METHODS["random_groups"]()) == frozenset()
    assert statistics_of(METHODS["easy_ep"]()) == {"expert_easy"}
    assert statistics_of(METHODS["block_influence"]()) == {"cosine"}


def test_random_groups_follow_the_seed(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    given = (METHODS["random_groups"](), model.block(0), model.layout, model.config, {}, 0)
    one, same = (group_scores(*given, seed=1)["neuron"][0] for _ in range(2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, group_scores(*given, seed=2)["neuron"][0])
