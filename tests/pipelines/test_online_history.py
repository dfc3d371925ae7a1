"""A model's earlier self, swapped in while it scores."""

import pytest
import torch

from prunery.errors import ModelError
from prunery.pipelines.online_history import History, fingerprint

from .tiny_training import llama, same_weights, weights


def push(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def inside(history, model):
    with history.swapped_in():
        return weights(model)


def test_base_stays_and_is_put_back():
    model = llama()
    start = weights(model)
    history = History(model, "base", decay=0.9, refresh=None)
    push(model, 1.0)
    history.advance(1)
    now = weights(model)
    assert same_weights(inside(history, model), start)
    assert same_weights(weights(model), now)
    assert not history.moves
    with pytest.raises(RuntimeError), history.swapped_in():
        raise RuntimeError
    assert same_weights(weights(model), now), "put back after a failure too"


def test_average_by_hand_once_a_step():
    model = llama()
    start = weights(model)
    history = History(model, "ema", decay=0.75, refresh=None)
    push(model, 1.0)
    history.advance(1)
    history.advance(1)
    push(model, 1.0)
    history.advance(2)
    # 0.25 after the first step; 0.75 * 0.25 + 0.25 * 2 after the second.
    for name, value in inside(history, model).items():
        assert torch.allclose(value, start[name] + 0.6875, atol=1e-6)


def test_refresh_takes_the_present_weights():
    model = llama()
    history = History(model, "base", decay=0.9, refresh=2)
    push(model, 1.0)
    history.advance(1)
    assert not same_weights(inside(history, model), weights(model))
    push(model, 1.0)
    history.advance(2)
    assert same_weights(inside(history, model), weights(model))
    push(model, 1.0)
    history.advance(3)
    assert not same_weights(inside(history, model), weights(model))


def test_save_and_load(tmp_path):
    model = llama()
    history = History(model, "ema", decay=0.5, refresh=None)
    push(model, 1.0)
    history.advance(1)
    history.save(tmp_path / "history")
    other = History(llama(3), "ema", decay=0.5, refresh=None)
    other.load(tmp_path / "history", 1)
    assert same_weights(other._weights, history._weights)
    assert other.step == 1
    with pytest.raises(ModelError, match="missing"):
        other.load(tmp_path / "nothing", 1)
    frozen = llama()
    frozen.lm_head.weight.requires_grad = False
    fewer = History(frozen, "ema", decay=0.5, refresh=None)
    with pytest.raises(ModelError, match="lm_head.weight"):
        fewer.load(tmp_path / "history", 1)


def test_fingerprint_tells_models_apart():
    assert fingerprint(llama()) == fingerprint(llama())
    assert fingerprint(llama()) != fingerprint(llama(1))
    model = llama()
    model.model.norm.weight.requires_grad = False
    before = fingerprint(model), fingerprint(model, frozen=True)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    assert fingerprint(model) != before[0]
    assert fingerprint(model, frozen=True) == before[1]
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    assert fingerprint(model, frozen=True) != before[1]


def test_average_of_half_precision_moves():
    model = llama().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    history = History(model, "ema", decay=0.999, refresh=None)
    push(model, 1.0)
    for step in range(1, 11):
        history.advance(step)
    assert history._weights["lm_head.weight"].mean() == pytest.approx(2 - 0.999**10, rel=1e-4)
    assert {one.dtype for one in inside(history, model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_restart_takes_the_weights_of_now(kind):
    model = llama()
    history = History(model, kind, decay=0.5, refresh=None)
    first = history.base
    push(model, 1.0)
    history.restart()
    assert same_weights(inside(history, model), weights(llama())), "nothing was trained yet"
    history.advance(1)
    history.restart()
    assert history.step == 0
    assert same_weights(inside(history, model), weights(model))
    assert (history.base != first) == (kind == "base")
