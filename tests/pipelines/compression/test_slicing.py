"""Blocks cut or zeroed compute what a full block with silenced channels does."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from prunery.errors import BudgetError, InputError
from prunery.pipelines.compression.groups import (
    ExpertCompressor,
    ExpertOptions,
    GroupCompressor,
    GroupOptions,
    LayerCompressor,
)
from prunery.pipelines.compression.slicing import (
    slice_heads,
    slice_neurons,
    zero_heads,
    zero_neurons,
)
from prunery.pruners.models.block_layouts import LAYOUTS
from prunery.pruners.models.streamed_model import StreamedModel

from ...tiny_causal import ARCHITECTURES, saved_model, tiny_model
from .groups_of import blocks_of, compressed, load, logits_of, plan_row, silence, token_rows

MOE = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = [name for name in ARCHITECTURES if name not in MOE]
FIXED_HEADS = ("gpt2", "opt", "bert")


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def sizes(folder):
    config = AutoConfig.from_pretrained(folder)
    layout = LAYOUTS[config.model_type]
    return config, layout, *layout.sizes(config)


def group_plan(folder, heads, neurons):
    """Rows that keep the positions given, by layer."""
    config, layout, _, kv, _ = sizes(folder)
    width = layout.neurons(config)
    plan = []
    for layer in range(3):
        if heads:
            plan.append(plan_row(layer, "attention", "head", kv, len(heads[layer]), heads[layer]))
        if neurons:
            kept = neurons[layer]
            plan.append(plan_row(layer, "mlp", "neuron", width, len(kept), kept))
    return plan


def silenced(folder, heads, neurons):
    """The stock model with the removed channels silenced by hooks."""
    config, layout, all_heads, kv, size = sizes(folder)
    model = load(folder, layout.head)
    wide = all_heads // kv * size
    for layer, block in enumerate(blocks_of(model, layout)):
        if heads:
            gone = [
                c
                for group in range(kv)
                if group not in heads[layer]
                for c in range(group * wide, (group + 1) * wide)
            ]
            silence(block.get_submodule(layout.output), gone)
        if neurons:
            width = layout.neurons(config)
            gone = [n for n in range(width) if n not in set(neurons[layer])]
            silence(block.get_submodule(layout.down), gone)
    return model, layout


def heads_of(name, kv):
    return [[0, 2], [1, 3], [0, 1]] if kv == 4 else [[0], [1], [0]]


NEURONS = [list(range(48)), list(range(16, 64)), list(range(8, 56))]
UNEVEN = [list(range(48)), list(range(16, 48)), list(range(1, 64, 2))]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("widths", ["uniform", "padded", "masked"])
def test_groups_removed_equal_channels_silenced(tmp_path, name, widths):
    folder = saved_model(tmp_path, name)
    config, layout, all_heads, kv, size = sizes(folder)
    neurons = NEURONS if widths == "uniform" else UNEVEN
    if name == "gpt2":
        neurons = [[2 * n for n in one] for one in neurons]
    heads = heads_of(name, kv)
    plan = group_plan(folder, heads, neurons)
    made = GroupCompressor(config, plan, GroupOptions(widths=widths))
    assert not made.wanted, "positions are given, nothing is scored"
    out, rows = compressed(folder, made, plan, tmp_path)
    model, layout = silenced(folder, heads, neurons)
    smaller = load(out, layout.head)
    close(logits_of(smaller), logits_of(model))

    found = smaller.config
    cut = widths != "masked"
    assert layout.neurons(found) == (48 if cut else layout.neurons(config))
    if cut and name not in FIXED_HEADS:
        assert layout.sizes(found) == (all_heads * len(heads[0]) // kv, len(heads[0]), size)
    else:
        assert layout.sizes(found) == (all_heads, kv, size)
    attention = [row for row in rows if row["unit"] == "head"]
    assert [row["positions"] for row in attention] == heads
    if name in FIXED_HEADS and cut:
        assert all("zeros at full width" in row["note"] for row in attention)
    if cut:
        assert smaller.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_cut_model_generates_and_is_opened_again(tmp_path, name):
    folder = saved_model(tmp_path, name)
    config, *_ = sizes(folder)
    plan = group_plan(folder, heads_of(name, 2), NEURONS)
    out, _ = compressed(folder, GroupCompressor(config, plan, GroupOptions()), plan, tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    made = load(out).generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    again = StreamedModel(out)
    assert again.block(0).get_submodule("mlp.up_proj").weight.shape[0] == 48


def wide_llama(tmp_path, name="llama"):
    """Eight heads of 4, each with its own keys."""
    return saved_model(tmp_path, name, num_attention_heads=8, num_key_value_heads=8)


def test_a_llama_whose_configuration_refuses_the_heads_is_padded_to_the_next_that_loads(tmp_path):
    folder = wide_llama(tmp_path)
    config, *_ = sizes(folder)
    heads = [[0, 2, 4], [1, 2, 3], [5, 6, 7]]  # hidden 32 is no multiple of 3
    plan = group_plan(folder, heads, None)
    out, rows = compressed(folder, GroupCompressor(config, plan, GroupOptions()), plan, tmp_path)
    smaller = load(out)
    assert smaller.config.num_attention_heads == 4
    assert "1 of 4 groups are zeros" in rows[0]["note"]
    close(logits_of(smaller), logits_of(silenced(folder, heads, None)[0]))


def test_heads_between_the_half_and_all_stay_at_full_width_in_a_llama(tmp_path):
    folder = wide_llama(tmp_path)
    config, *_ = sizes(folder)
    heads = [[0, 1, 2, 3, 4]] * 3
    plan = group_plan(folder, heads, None)
    made = GroupCompressor(config, plan, GroupOptions())
    assert made.config() == {}
    out, rows = compressed(folder, made, plan, tmp_path)
    assert "no fewer than 8 groups load" in rows[0]["note"]
    close(logits_of(load(out)), logits_of(silenced(folder, heads, None)[0]))


def test_a_llama_may_become_a_mistral_of_fewer_heads(tmp_path):
    folder = wide_llama(tmp_path)
    config, *_ = sizes(folder)
    heads = [[0, 2, 4], [1, 2, 3], [5, 6, 7]]
    plan = group_plan(folder, heads, None)
    made = GroupCompressor(config, plan, GroupOptions(convert=True))
    out, _ = compressed(folder, made, plan, tmp_path)
    smaller = load(out)
    assert type(smaller).__name__ == "MistralForCausalLM"
    assert smaller.config.num_attention_heads == 3
    close(logits_of(smaller), logits_of(silenced(folder, heads, None)[0]))


def test_heads_of_a_mixture_of_experts_are_cut(tmp_path):
    folder = saved_model(tmp_path, "mixtral")
    config, *_ = sizes(folder)
    plan = group_plan(folder, [[0], [1], [0]], None)
    out, _ = compressed(folder, GroupCompressor(config, plan, GroupOptions()), plan, tmp_path)
    close(logits_of(load(out)), logits_of(silenced(folder, [[0], [1], [0]], None)[0]))


def test_dense_layers_among_experts_are_cut(tmp_path):
    """Layer 1 of the tiny Qwen2-MoE is dense."""
    folder = saved_model(tmp_path, "qwen2_moe")
    config, *_ = sizes(folder)
    plan = [plan_row(1, "mlp", "neuron", 64, 40, list(range(3, 43)))]
    out, _ = compressed(folder, GroupCompressor(config, plan, GroupOptions()), plan, tmp_path)
    model = load(folder)
    silence(model.model.layers[1].mlp.down_proj, [*range(3), *range(43, 64)])
    smaller = load(out)
    assert smaller.config.intermediate_size == 40
    close(logits_of(smaller), logits_of(model))


def shut(router, kept, top_k, renormalise):
    """A router that never sees the experts that were removed; independent of transformers'."""

    def forward(hidden):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(hidden, router.weight)
        mask = torch.full((logits.shape[1],), -torch.inf)
        mask[kept] = 0
        chance = torch.softmax((logits + mask).float(), -1)
        weight, index = chance.topk(min(top_k, len(kept)), -1)
        if renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return logits, weight.to(logits.dtype), index

    router.forward = forward


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("count", [1, 3])
def test_experts_removed_equal_experts_never_chosen(tmp_path, name, count):
    folder = saved_model(tmp_path, name)
    config, layout, *_ = sizes(folder)
    kept = {0: [0, 1, 3][:count], 1: [1, 2, 3][-count:], 2: [0, 2, 3][:count]}
    layers = [0, 2] if name == "qwen2_moe" else [0, 1, 2]
    plan = [plan_row(k, "experts", "expert", 4, count, kept[k]) for k in layers]
    made = ExpertCompressor(config, plan, ExpertOptions())
    out, rows = compressed(folder, made, plan, tmp_path)
    model = load(folder)
    for layer in layers:
        router = model.model.layers[layer].get_submodule(layout.router)
        renormalise = name == "mixtral" or config.norm_topk_prob
        shut(router, kept[layer], 2, renormalise)
    smaller = load(out)
    close(logits_of(smaller), logits_of(model))
    assert getattr(smaller.config, layout.expert_count) == count
    assert smaller.config.num_experts_per_tok == min(2, count)
    assert [row["positions"] for row in rows] == [kept[layer] for layer in layers]
    assert bool(rows[0]["note"]) == (count < 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen2_moe", "bert"])
def test_dropped_layers_are_passed_by(tmp_path, name):
    folder = saved_model(tmp_path, name)
    config, layout, *_ = sizes(folder)
    plan = [plan_row(0, "", "layer", 1, 0), plan_row(1, "", "layer", 1, 1)]
    out, rows = compressed(folder, LayerCompressor(config, plan), plan, tmp_path)
    model = load(folder, layout.head)
    blocks = model.get_submodule(layout.blocks)
    blocks[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    smaller = load(out, layout.head)
    assert len(blocks_of(smaller, layout)) == 2
    close(logits_of(smaller), logits_of(model))
    assert [(row["layer"], row["kept"]) for row in rows] == [(0, 0), (1, 1)]


def test_a_stride_of_experts_becomes_a_list_when_layers_go(tmp_path):
    folder = saved_model(tmp_path, "qwen3_moe", decoder_sparse_step=2)  # layer 1 has experts
    config, *_ = sizes(folder)
    plan = [plan_row(0, "", "layer", 1, 0)]
    out, _ = compressed(folder, LayerCompressor(config, plan), plan, tmp_path)
    model = load(folder)
    model.model.layers[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    close(logits_of(load(out)), logits_of(model))


# -- what cannot be met ----------------------------------------------------------------------


def llama_plan(neurons):
    return [plan_row(k, "mlp", "neuron", 64, keep) for k, keep in enumerate(neurons)]


@pytest.mark.parametrize(
    ("keep", "align", "nearest"), [(0, 1, "1"), (0, 16, "16"), (20, 16, "16 or 32"), (63, 16, "48")]
)
def test_a_width_that_no_group_meets_names_layer_and_nearest(tmp_path, keep, align, nearest):
    config, *_ = sizes(saved_model(tmp_path, "llama"))
    with pytest.raises(BudgetError, match=rf"layer 1 mlp.*found {keep}.*possible: {nearest}"):
        GroupCompressor(config, llama_plan([32, keep, 32]), GroupOptions(align=align))


@pytest.mark.parametrize(
    ("name", "biases"),
    [("gpt2", ["attn.c_attn", "mlp.c_fc"]), ("opt", ["self_attn.v_proj", "fc1"])],
)
def test_what_is_set_to_zero_has_no_bias_either(tmp_path, name, biases):
    config, layout, *_ = sizes(saved_model(tmp_path, name))
    block = tiny_model(name).get_submodule(f"{layout.blocks}.0")
    for bias in biases:
        block.get_submodule(bias).bias.data.fill_(1)
    zero_heads(block, layout, config, [0, 2, 3])
    zero_neurons(block, layout, list(range(1, layout.neurons(config))))
    heads, neurons = (block.get_submodule(bias).bias for bias in biases)
    value = heads[-32:]  # after query and key, where they are one matrix
    assert value[8:16].count_nonzero() == 0 and value.count_nonzero() == 24
    assert neurons[0] == 0 and neurons.count_nonzero() == neurons.numel() - 1


def test_all_neurons_may_stay_whatever_the_multiple(tmp_path):
    config, *_ = sizes(saved_model(tmp_path, "llama"))
    made = GroupCompressor(config, llama_plan([64, 64, 64]), GroupOptions(align=48))
    assert made.widths.neuron is None
    made = GroupCompressor(
        config, llama_plan([48, 64, 48]), GroupOptions(align=48, widths="masked")
    )
    assert made.widths.neuron is None
    with pytest.raises(BudgetError, match="The nearest possible: 48 or 64"):
        GroupCompressor(config, llama_plan([60, 64, 64]), GroupOptions(align=48))


def test_no_head_left_names_the_layer(tmp_path):
    config, *_ = sizes(saved_model(tmp_path, "llama"))
    with pytest.raises(BudgetError, match=r"layer 2 attention.*nearest possible: 1"):
        GroupCompressor(config, [plan_row(2, "attention", "head", 2, 0)], GroupOptions())


def test_uneven_widths_are_refused_unless_asked_for(tmp_path):
    config, *_ = sizes(saved_model(tmp_path, "llama"))
    with pytest.raises(InputError, match="layer 0 keeps 32 of 64 neurons and layer 2 keeps 48"):
        GroupCompressor(config, llama_plan([32, 32, 48]), GroupOptions())
    with pytest.raises(InputError, match="layer 1 keeps 64"):  # a layer that the plan leaves out
        GroupCompressor(config, llama_plan([32])[:1], GroupOptions())
    made = GroupCompressor(config, llama_plan([32, 32, 48]), GroupOptions(widths="padded"))
    assert made.config() == {"intermediate_size": 48}
    full = GroupCompressor(config, llama_plan([32])[:1], GroupOptions(widths="padded"))
    assert full.config() == {}


def test_uneven_or_no_experts_are_refused(tmp_path):
    config, *_ = sizes(saved_model(tmp_path, "mixtral"))
    rows = [plan_row(k, "experts", "expert", 4, keep) for k, keep in enumerate([2, 3, 2])]
    with pytest.raises(InputError, match="layer 0 keeps 2 of 4 and layer 1 keeps 3"):
        ExpertCompressor(config, rows, ExpertOptions())
    none = [plan_row(k, "experts", "expert", 4, 0) for k in range(3)]
    with pytest.raises(BudgetError, match="layer 0 experts"):
        ExpertCompressor(config, none, ExpertOptions())
    dense, *_ = sizes(saved_model(tmp_path, "llama"))
    with pytest.raises(InputError, match="llama has none"):
        ExpertCompressor(dense, rows, ExpertOptions())


def test_a_plan_that_drops_every_layer_is_refused(tmp_path):
    config, *_ = sizes(saved_model(tmp_path, "llama"))
    with pytest.raises(BudgetError, match="at least 1 of 3 layers"):
        LayerCompressor(config, [plan_row(k, "", "layer", 1, 0) for k in range(3)])


def test_positions_that_are_none_of_the_block_are_refused(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    for keep in ([1, 0], [0, 64], [-1, 3], [2, 2]):
        with pytest.raises(InputError, match="ascending positions of 64 neurons"):
            slice_neurons(model.block(0), model.layout, keep)
    gpt2 = StreamedModel(saved_model(tmp_path, "gpt2"))
    with pytest.raises(InputError, match="gpt2.*zero_heads"):
        slice_heads(gpt2.block(0), gpt2.layout, gpt2.config, [0])
    moe = StreamedModel(saved_model(tmp_path, "mixtral"))
    with pytest.raises(InputError, match="found experts"):
        slice_neurons(moe.block(0), moe.layout, [0])


def test_rows_are_read_one_by_one_as_in_a_batch(tmp_path):
    """The walk's batches do not change what is cut."""
    folder = saved_model(tmp_path, "llama")
    config, *_ = sizes(folder)
    plan = llama_plan([32, 32, 32])
    kept = []
    for number, tokens in enumerate((14, 10**6)):
        made = GroupCompressor(config, plan, GroupOptions(method="wanda_sp"))
        (tmp_path / str(number)).mkdir()
        _, rows = compressed(
            folder, made, plan, tmp_path / str(number), rows=token_rows(), tokens=tokens
        )
        kept.append([row["positions"] for row in rows])
    assert kept[0] == kept[1]
