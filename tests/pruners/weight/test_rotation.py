import pytest
import torch
from transformers import AutoModelForCausalLM

from prunery.errors import InputError, ModelError
from prunery.pipelines.compression.rotated import rotated_model
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.pruners.weight.rotation import rotate_block, rotation

from ...tiny_causal import ARCHITECTURES, saved_model

CENTRED = ("gpt2", "opt", "bert")


@pytest.mark.parametrize("size", [1, 2, 3, 32, 48, 7])
def test_a_rotation_is_orthonormal_and_mixes(size):
    q = rotation(size, seed=3).matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    if size >= 7:  # nothing stays where it was, nor in one block
        assert (q.abs() > 1e-6).double().mean() > 0.95
        assert not torch.equal(q, rotation(size, seed=4).matrix())
    assert torch.equal(q, rotation(size, seed=3).matrix())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in CENTRED])
def test_the_function_is_the_same(tmp_path, name):
    source = saved_model(tmp_path, name)
    folder = tmp_path / "rotated"
    folder.mkdir()
    rotated_model(StreamedModel(source), folder, seed=5)
    before = AutoModelForCausalLM.from_pretrained(source).eval()
    after = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert after.config.tie_word_embeddings is False
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = before(ids).logits, after(ids).logits
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert one.std() > 0.1
        states = before(ids, output_hidden_states=True).hidden_states
        turned = after(ids, output_hidden_states=True).hidden_states
    # The stream itself is rotated; the last state comes after the norm, whose weights moved.
    q = rotation(32, seed=5)
    for h, hq in zip(states[:-1], turned[:-1], strict=True):
        torch.testing.assert_close(q.apply(h), hq, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(states[1], turned[1], atol=0.1)


def test_sizes_that_are_no_power_of_two(tmp_path):
    source = saved_model(tmp_path, "llama", hidden_size=24, num_attention_heads=2, head_dim=12)
    folder = tmp_path / "rotated"
    folder.mkdir()
    rotated_model(StreamedModel(source), folder, seed=5)
    before = AutoModelForCausalLM.from_pretrained(source).eval()
    after = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(before(ids).logits, after(ids).logits, rtol=1e-3, atol=1e-3)


def test_an_outlier_is_spread_out(tmp_path):
    source = saved_model(tmp_path, "llama")
    model = StreamedModel(source)
    block = model.block(0)
    weight = block.get_submodule("mlp.up_proj").weight.data
    weight[:, 5] *= 100
    before = float(weight.abs().max() / weight.square().mean().sqrt())
    rotate_block(block, model.layout, rotation(32, seed=0))
    after = float(weight.abs().max() / weight.square().mean().sqrt())
    assert after < before / 2


@pytest.mark.parametrize("name", CENTRED)
def test_norms_that_subtract_the_mean_are_refused_by_name(tmp_path, name):
    model = StreamedModel(saved_model(tmp_path, name))
    folder = tmp_path / "rotated"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"(ln_1|layer_norm|LayerNorm): .*found LayerNorm"):
        rotated_model(model, folder, seed=0)
    assert not list(folder.glob("*.json"))


def test_another_size_is_refused(tmp_path):
    model = StreamedModel(saved_model(tmp_path, "llama"))
    with pytest.raises(ModelError, match="stream of 16 numbers.*found 32"):
        rotate_block(model.block(0), model.layout, rotation(16, seed=0))
    with pytest.raises(InputError, match="at least one coordinate"):
        rotation(0, seed=0)
