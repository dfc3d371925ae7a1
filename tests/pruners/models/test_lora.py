import pytest
import torch
from torch import nn
from transformers import BertModel

from prunery.errors import ModelError
from prunery.pruners.models.lora import add_lora, fold_lora, lora_state, set_lora, target_names

from .tiny import bert_config, pair


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BertModel(bert_config()).eval()


def trained(seed: int = 0) -> nn.Module:
    model = bert(seed)
    add_lora(model, 3, 6.0, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def test_one_layer_by_hand() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer[0].bias.copy_(torch.tensor([0.5, 0.0]))
    state = {"0.lora_A": torch.tensor([[1.0, 2.0]]), "0.lora_B": torch.tensor([[3.0], [0.0]])}
    fold_lora(layer, state, rank=1, alpha=2.0)
    # W + 2/1 * [[3], [0]] [[1, 2]] = [[7, 12], [0, 1]]
    assert layer[0].weight.tolist() == [[7.0, 12.0], [0.0, 1.0]]


def test_fresh_factors_change_nothing_and_alone_are_trained() -> None:
    plain, wrapped = bert(), bert()
    names = add_lora(wrapped, 4, 8.0, seed=0)
    a, b = plain(**pair()).last_hidden_state, wrapped(**pair()).last_hidden_state
    assert torch.equal(a, b)
    open_ = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert open_ == {f"{n}.lora_{x}" for n in names for x in "AB"}
    assert len(names) == 2 * 6
    assert not any("pooler" in n for n in names)


def test_folding_equals_the_wrapped_layers() -> None:
    model = trained()
    folded = bert()
    fold_lora(folded, lora_state(model), 3, 6.0)
    want = model(**pair()).last_hidden_state
    torch.testing.assert_close(folded(**pair()).last_hidden_state, want)
    assert (want - bert()(**pair()).last_hidden_state).abs().max() > 1e-3


def test_stored_factors_come_back() -> None:
    model, other = trained(), bert()
    add_lora(other, 3, 6.0, seed=7)
    set_lora(other, lora_state(model))
    for name, value in lora_state(model).items():
        assert torch.equal(lora_state(other)[name], value)


def test_factors_of_another_network_are_refused() -> None:
    state = lora_state(trained())
    with pytest.raises(ModelError, match="belongs to another encoder"):
        fold_lora(bert(), dict(list(state.items())[2:]), 3, 6.0)
    with pytest.raises(ModelError, match="belongs to another encoder"):
        fold_lora(bert(), state, 4, 6.0)
    with pytest.raises(ModelError, match="rank"):
        add_lora(bert(), 0, 1.0, seed=0)
    with pytest.raises(ModelError, match="no"):
        target_names(nn.LayerNorm(2))


def test_bfloat16_base_keeps_float32_factors_and_gradients() -> None:
    model = bert().to(torch.bfloat16)
    add_lora(model, 2, 4.0, seed=0)
    out = model(**pair()).last_hidden_state
    assert out.dtype == torch.bfloat16
    out.float().pow(2).sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("lora_B")]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    assert any(g.abs().sum() > 0 for g in grads)
