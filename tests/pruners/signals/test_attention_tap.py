"""The tap against the attentions that eager models give out, and against what it must not do."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prunery.errors import InputError, ModelError
from prunery.pruners.signals.attention_tap import tap_attention
from prunery.pruners.signals.tokens import PromptAttention, score_tokens

from .causal_models import VOCABULARY, padded, rows, tiny_model

MAKES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "granite"]


def attentions(name, layer, **inputs):
    """(B, H, S, S) softmax attention of one layer, from the same weights run eagerly."""
    model = tiny_model(name, "eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions[layer].double()


def mass(weights, trainable, prompt):
    """(B, S): the definition, by the whole matrix."""
    return (weights.mean(1) * prompt[:, None, :]).sum(-1) * trainable


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("name", MAKES)
def test_prompt_attention_is_that_of_the_whole_matrix(name, layer, implementation):
    ids, mask = padded(rows(12, 7, 9), "right")
    trainable = torch.zeros_like(ids, dtype=torch.bool)
    trainable[0, 4:7] = trainable[0, 9:12] = True  # two turns
    trainable[1, 5:7] = True
    trainable[2, 2] = trainable[2, 8] = True
    scores = score_tokens(
        tiny_model(name, implementation),
        ids,
        trainable,
        attention_mask=mask,
        attention=PromptAttention(layer=layer),
    )
    weights = attentions(name, layer, input_ids=ids, attention_mask=mask)
    wanted = mass(weights, trainable, ~trainable & mask.bool())[trainable]
    np.testing.assert_allclose(scores.prompt_attention, wanted, atol=2e-5)
    assert scores.prompt_attention.dtype == torch.float32
    assert wanted.min() > 0.01 and wanted.max() < 0.999


@pytest.mark.parametrize("name", MAKES)
def test_left_padding_changes_nothing(name):
    found = rows(10, 6)
    made = []
    for side in ("left", "right"):
        ids, mask = padded(found, side)
        trainable = mask.bool() & (mask.cumsum(1) > 3)
        made.append(
            score_tokens(
                tiny_model(name),
                ids,
                trainable,
                attention_mask=mask,
                attention=PromptAttention(exclude_sink=1),
            ).prompt_attention
        )
    torch.testing.assert_close(*made, atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(2, 8), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from(["llama", "gemma2", "gpt2"]),
)
def test_packed_documents_have_the_mass_they_have_alone(lengths, sink, name):
    model = tiny_model(name)
    found = rows(*lengths)
    asked = PromptAttention(exclude_sink=sink)
    alone = [
        score_tokens(model, row[None], torch.arange(len(row))[None] >= 2, attention=asked)
        for row in found
        if len(row) > 2
    ]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = score_tokens(
        model, torch.cat(found)[None], positions >= 2, position_ids=positions, attention=asked
    )
    if alone:
        wanted = torch.cat([scores.prompt_attention for scores in alone])
        torch.testing.assert_close(packed.prompt_attention, wanted, atol=2e-5, rtol=0)


def test_the_sink_does_not_count_as_prompt():
    (row,) = rows(8)
    trainable = torch.arange(8)[None] >= 5
    weights = attentions("llama", -1, input_ids=row[None])
    for sink in range(6):
        scores = score_tokens(
            tiny_model("llama"),
            row[None],
            trainable,
            attention=PromptAttention(exclude_sink=sink),
        )
        prompt = ~trainable & (torch.arange(8)[None] >= sink)
        wanted = mass(weights, trainable, prompt)[trainable]
        np.testing.assert_allclose(scores.prompt_attention, wanted, atol=2e-5)
    assert scores.prompt_attention.tolist() == [0, 0, 0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MAKES)
def test_the_tapped_run_is_bit_identical(name, implementation):
    model = tiny_model(name, implementation)
    ids, mask = padded(rows(9, 6), "right")
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with tap_attention(model, 1) as tap:
            tapped = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(plain, tapped)
    assert tap.query.shape[:3] == (2, 4, 9)
    assert tap.key.shape[2] == 9


def test_the_own_function_sees_its_own_name():
    """Flash attention reads the name from the module's configuration while it runs."""
    seen = []

    def flash(module, *arguments, **given):
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, **given)

    ALL_ATTENTION_FUNCTIONS["pretended_flash"] = flash
    try:
        model = tiny_model("llama")
        model.config._attn_implementation_internal = "pretended_flash"
        with torch.no_grad(), tap_attention(model, 0) as tap:
            model(input_ids=rows(5)[0][None])
    finally:
        del ALL_ATTENTION_FUNCTIONS["pretended_flash"]
    assert seen == ["pretended_flash"] * 3
    assert tap.query is not None


def test_everything_is_put_back_after_an_exception():
    model = tiny_model("llama")
    names = set(ALL_ATTENTION_FUNCTIONS)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ZeroDivisionError), tap_attention(model, 1):
        _ = 1 / (len(set(ALL_ATTENTION_FUNCTIONS) - names) - 1)
    after = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(a is b for a, b in zip(configs, after, strict=True))
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert model.config.to_dict() == before
    with torch.no_grad(), pytest.raises(RuntimeError), tap_attention(model, 1):
        model(input_ids=rows(5)[0][None], attention_mask=torch.ones(1, 1, 2, 2))
    assert set(ALL_ATTENTION_FUNCTIONS) == names


def test_no_other_layer_or_model_is_touched():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    (row,) = rows(6)
    with torch.no_grad(), tap_attention(model, 1) as tap:
        other(input_ids=row[None])
        assert tap.query is None
        with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn \(LlamaAttention\)"):
            tap.taken()
        with tap_attention(other, 0) as second:
            model(input_ids=row[None])
            assert tap.query is not None
            assert second.query is None


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there(layer):
    with (
        pytest.raises(InputError, match=f"from -3 to 2.*found {layer}"),
        tap_attention(tiny_model("llama"), layer),
    ):
        pass


def test_linear_attention_is_refused_by_name_and_its_neighbour_is_read():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=r"layers\.0 .*GatedDeltaNet"), tap_attention(model, 0):
        pass
    (row,) = rows(6)
    scores = score_tokens(
        model, row[None], torch.arange(6)[None] > 2, attention=PromptAttention(layer=1)
    )
    assert scores.prompt_attention.isfinite().all()


def test_gpt2_with_its_own_upcast_attention_is_refused():
    model = tiny_model("gpt2", "eager")
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = True
    with pytest.raises(ModelError, match="reorder_and_upcast_attn=False"), tap_attention(model):
        pass


def test_a_mask_of_another_kind_is_refused():
    model = tiny_model("llama", "eager")
    segment = torch.zeros(1, 6, dtype=torch.int64)
    both_ways = torch.zeros(1, 1, 6, 6)
    with torch.no_grad(), tap_attention(model) as tap:
        model(input_ids=rows(6)[0][None], attention_mask=both_ways)
    with pytest.raises(ModelError, match="expected a causal mask"):
        tap.check_mask(segment)
    with torch.no_grad(), tap_attention(model) as tap:
        model(input_ids=rows(6)[0][None])
    tap.check_mask(segment)
    segment[0, 3:] = 1  # two documents, which the model did not keep apart
    with pytest.raises(ModelError, match="expected a causal mask"):
        tap.check_mask(segment)
