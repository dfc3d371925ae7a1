"""Streamed gradients against autograd through the whole model, and what a killed pass leaves."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.gradients import GradientPass
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.pruners.signals.block_statistics import GRADIENT_STATISTICS

from ...tiny_causal import saved_model

CAUSAL = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gpt2", "opt"]
EXPERTS = ["mixtral", "qwen2_moe"]


def rows(count=4, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(2, longest)) for _ in range(count)]


def whole_gradients(folder, given, names):
    """Sums of g, g² and |g| over rows, by name of the weight, (out, in) as it is stored."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    sums = {}
    for row in given:
        model.zero_grad()
        ids = torch.from_numpy(row)[None]
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        (-logits.gather(1, ids[0, 1:, None]).mean()).backward()
        for name, parameter in model.named_parameters():
            if name in names and parameter.grad is not None:
                g = parameter.grad
                old = sums.get(name, (0, 0, 0))
                sums[name] = tuple(s + v for s, v in zip(old, (g, g**2, g.abs()), strict=True))
    return sums


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_are_those_of_the_whole_model(tmp_path, name):
    folder, given = saved_model(tmp_path, name), rows()
    model = StreamedModel(folder)
    made = GradientPass(model, given, tmp_path / "work", GRADIENT_STATISTICS)
    made.run()
    layout = model.layout
    matrices = layout.matrices(model.empty_block(0))
    full = {
        f"{layout.blocks}.{layer}.{matrix.name}.weight": (layer, matrix.name)
        for layer in range(model.layers)
        for matrix in matrices
    }
    wanted = whole_gradients(folder, given, full)
    assert set(wanted) == set(full)
    for stored, (layer, matrix) in full.items():
        found = made.layer(layer)
        assert int(found[matrix, "gradient_rows"]) == len(given)
        for statistic, value in zip(
            ("gradient", "gradient_square", "gradient_abs"), wanted[stored], strict=True
        ):
            value = value.T if layout.transposed else value
            got = found[matrix, statistic]
            assert got.dtype == torch.float32
            atol = 2e-4 * float(value.abs().max())
            torch.testing.assert_close(got.double(), value, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("name", EXPERTS)
def test_gradients_of_experts(tmp_path, name):
    folder, given = saved_model(tmp_path, name), rows()
    model = StreamedModel(folder)
    made = GradientPass(model, given, tmp_path / "work", frozenset({"gradient_square"}))
    made.run()
    names = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(3)]
    wanted = whole_gradients(folder, given, names)
    checked = 0
    for layer, stored in enumerate(names):
        if stored not in wanted:
            continue
        square = wanted[stored][1]
        for expert in range(4):
            found = made.layer(layer)
            gate, up = (
                found[f"mlp.experts.{expert}.{part}", "gradient_square"]
                for part in ("gate_proj", "up_proj")
            )
            got = torch.cat([gate, up]).double()
            torch.testing.assert_close(
                got, square[expert], rtol=5e-3, atol=2e-4 * float(square.max())
            )
            checked += bool(got.any())
    assert checked > 4
    assert {statistic for _, statistic in made.layer(0)} == {"gradient_square", "gradient_rows"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("lost", ["nothing", "forward", "backward", "layer"])
def test_a_killed_pass_goes_on_with_the_same_bytes(tmp_path, stop, lost):
    model, given = StreamedModel(saved_model(tmp_path, "llama")), rows()
    whole = GradientPass(model, given, tmp_path / "whole", GRADIENT_STATISTICS)
    whole.run()

    def kill(layer):
        if layer == stop:
            raise Killed

    with pytest.raises(Killed):
        GradientPass(model, given, tmp_path / "cut", GRADIENT_STATISTICS).run(kill)
    if lost == "layer":
        path = tmp_path / "cut" / "backward" / "layer-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif lost != "nothing":
        for path in (tmp_path / "cut" / lost).glob("hidden-*"):
            path.unlink()
    visited = []
    cut = GradientPass(model, given, tmp_path / "cut", GRADIENT_STATISTICS)
    cut.run(visited.append)
    started = lost == "nothing" or (stop == 0 and lost != "layer")
    assert visited == list(reversed(range(stop if started else 3)))
    for layer in range(3):
        one, other = whole.layer(layer), cut.layer(layer)
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_disk_holds_inputs_only_while_they_are_needed(tmp_path):
    model, given = StreamedModel(saved_model(tmp_path, "llama")), rows()
    held = []

    def look(layer):
        found = {p.name.split("-")[1] for p in (tmp_path / "work/forward").glob("hidden-*")}
        held.append(sorted(int(number) for number in found))

    GradientPass(model, given, tmp_path / "work", GRADIENT_STATISTICS).run(look)
    assert held == [[0, 1, 2], [0, 1], [0]]


def test_a_masked_model_has_no_next_token(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "bert"))
    with pytest.raises(InputError, match="found a masked one"):
        GradientPass(model, rows(), tmp_path / "work", GRADIENT_STATISTICS)


def test_gradients_that_are_no_numbers_name_layer_and_row(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"), dtype="float16")
    fill = model.fill

    def overflow(block, tensors, layer):
        fill(block, tensors, layer)
        if layer == 1:
            block.get_submodule("mlp.down_proj").weight.data.fill_(6e4)

    model.fill = overflow
    with pytest.raises(ModelError, match=r"layer 1: expected finite outputs.*row \d"):
        GradientPass(model, rows(), tmp_path / "work", GRADIENT_STATISTICS).run()
