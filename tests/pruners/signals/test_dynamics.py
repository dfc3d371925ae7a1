"""Signals of training dynamics: by hand, against plain formulas, gradients against backward."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from prunery.errors import InputError, ModelError
from prunery.pruners.models.classifiers import ModelSpec, make_model
from prunery.pruners.signals import dynamics
from prunery.pruners.signals.dynamics import (
    gradient_norms,
    last_layer_norms,
    log_probabilities,
    measures,
)


def test_a_case_by_hand():
    # p = (1/4, 3/4) and (1/2, 1/2); the label is the less likely one, then a tie.
    logits = np.log(np.array([[1.0, 3.0], [1.0, 1.0]]))
    before = np.log(np.array([[0.5, 0.5], [0.5, 0.5]]))
    found = measures(logits, np.array([0, 1]), before)
    np.testing.assert_allclose(found["true_probability"], [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["margin"], [-np.log(3), 0.0], rtol=1e-6)
    assert found["correct"].tolist() == [False, False]
    np.testing.assert_allclose(found["loss"], [np.log(4), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(found["el2n"], [np.sqrt(2) * 0.75, np.sqrt(2) * 0.5], rtol=1e-6)
    change = 0.25 * np.log(2) + 0.75 * np.log(1.5)
    np.testing.assert_allclose(found["probability_change"], [change, 0.0], rtol=1e-6, atol=1e-7)
    assert "probability_change" not in measures(logits, np.array([0, 1]))
    assert {found[name].dtype for name in found if name != "correct"} == {np.dtype("float32")}


def test_a_margin_is_one_of_logits_and_a_tie_is_not_correct():
    logits = np.array([[5.0, 2.0, 4.0], [5.0, 2.0, 5.0], [5.0, 2.0, 5.0]])
    found = measures(logits, np.array([0, 0, 1]))
    assert found["margin"].tolist() == [1.0, 0.0, -3.0]
    assert found["correct"].tolist() == [True, False, False]


def test_a_single_class_is_always_right():
    found = measures(np.array([[3.0], [-7.0]]), np.array([0, 0]))
    assert found["margin"].tolist() == [0.0, 0.0]
    assert found["correct"].tolist() == [True, True]
    assert found["loss"].tolist() == found["el2n"].tolist() == [0.0, 0.0]
    assert found["true_probability"].tolist() == [1.0, 1.0]


def test_extreme_logits_stay_finite_and_ordered():
    logits = np.array([[800.0, -800.0], [-800.0, 800.0], [30.0, 0.0], [40.0, 0.0]], np.float32)
    found = measures(logits, np.zeros(4, np.int64), log_probabilities(-logits))
    for column in found.values():
        assert np.isfinite(column).all()
    np.testing.assert_allclose(found["loss"], [0.0, 1600.0, np.exp(-30), np.exp(-40)], rtol=1e-3)
    close = np.sqrt(2) * np.exp([-30.0, -40.0])
    np.testing.assert_allclose(found["el2n"][2:], close, rtol=1e-3)  # 1 - p would have cancelled
    np.testing.assert_allclose(found["probability_change"][:2], [1600.0, 1600.0])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), classes=st.integers(2, 9), seed=st.integers(0, 999))
def test_measures_are_the_plain_formulas(n, classes, seed):
    rng = np.random.default_rng(seed)
    logits, old = rng.normal(0, 3, (2, n, classes))
    label = rng.integers(0, classes, n)
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (logits, old))
    one = np.eye(classes)[label]
    found = measures(logits, label, np.log(q))
    others = np.where(one == 1, -np.inf, logits).max(axis=1)
    margin = (logits * one).sum(axis=1) - others
    np.testing.assert_allclose(found["true_probability"], (p * one).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["margin"], margin, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["loss"], -np.log((p * one).sum(axis=1)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["el2n"], np.linalg.norm(p - one, axis=1), rtol=1e-5)
    change = np.abs(p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(found["probability_change"], change, rtol=1e-5, atol=1e-7)
    assert (found["correct"] == (logits.argmax(axis=1) == label)).all()


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(23, 4)), rng.integers(0, 4, 23)
    before = log_probabilities(rng.normal(size=(23, 4)))
    whole = measures(logits, label, before)
    norms = last_layer_norms(logits, logits, label)
    monkeypatch.setattr(dynamics, "_BLOCK", 5 * 4)
    for name, column in measures(logits, label, before).items():
        np.testing.assert_array_equal(column, whole[name])
    np.testing.assert_array_equal(last_layer_norms(logits, logits, label), norms)
    assert {len(c) for c in measures(logits[:0], label[:0]).values()} == {0}


def test_what_does_not_fit_is_refused():
    logits = np.zeros((2, 3))
    with pytest.raises(InputError, match="from 0 to 2, one for each logit; found 3 in row 1"):
        measures(logits, np.array([0, 3]))
    with pytest.raises(InputError, match="found -1 in row 0"):
        measures(logits, np.array([-1, 0]))
    with pytest.raises(InputError, match="of the same rows"):
        measures(logits, np.array([0]))
    with pytest.raises(InputError, match="epoch before"):
        measures(logits, np.array([0, 1]), np.zeros((2, 2)))
    logits[1, 2] = np.nan
    with pytest.raises(ModelError, match="row 1"):
        measures(logits, np.array([0, 1]))


def trained_looking(name, shape):
    """A network with running numbers and scales as training leaves them, and rows for it."""
    torch.manual_seed(3)
    model = make_model(ModelSpec(name, hidden=16, depth=2), shape, 4, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(7, *shape)
    return model, x, np.array([0, 1, 2, 3, 0, 1, 2])


def by_backward(model, x, label, parameters):
    """One backward pass a row."""
    model.eval()
    found = []
    for row in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[row : row + 1]), torch.tensor(label[row : row + 1])).backward()
        found.append(np.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters)))
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (5,)), ("cnn", (2, 9, 8)), ("resnet20", (1, 8, 8))]
)
def test_gradient_norms_are_those_of_a_backward_pass_a_row(name, shape, monkeypatch):
    model, x, label = trained_looking(name, shape)
    model.train()
    monkeypatch.setattr(dynamics, "_MOST_ROWS", 3)
    whole = gradient_norms(model, x, label, "all")
    last = gradient_norms(model, x, label, "last_layer", batch_size=3)
    assert model.training
    np.testing.assert_allclose(
        whole, by_backward(model, x, label, list(model.parameters())), rtol=2e-4
    )
    np.testing.assert_allclose(
        last, by_backward(model, x, label, list(model.head.parameters())), rtol=2e-4
    )
    assert (whole >= last).all()
    assert whole.dtype == last.dtype == np.float32


def test_a_norm_hangs_on_no_other_row():
    model, x, label = trained_looking("cnn", (2, 9, 8))
    for kind in ("all", "last_layer"):
        together = gradient_norms(model, x, label, kind)
        alone = [gradient_norms(model, x[i : i + 1], label[i : i + 1], kind)[0] for i in range(7)]
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        assert gradient_norms(model, x[:0], label[:0], kind).shape == (0,)


def test_frozen_parameters_and_a_missing_bias_do_not_count():
    model, x, label = trained_looking("mlp", (5,))
    model.body.requires_grad_(False)
    np.testing.assert_allclose(
        gradient_norms(model, x, label, "all"), gradient_norms(model, x, label), rtol=1e-5
    )
    logits, h = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    error = np.sqrt(0.5)
    one = np.array([0])
    np.testing.assert_allclose(last_layer_norms(logits, h, one), [error * np.sqrt(26)], rtol=1e-6)
    np.testing.assert_allclose(last_layer_norms(logits, h, one, bias=False), [error * 5], rtol=1e-6)


def test_a_network_that_cannot_be_followed_says_so():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 4)

        def features(self, x):
            return x * float(x.sum())  # a number out of a tensor

        def forward(self, x):
            return self.head(self.features(x))

    with pytest.raises(ModelError, match="last_layer"):
        gradient_norms(Odd(), torch.rand(2, 5), np.array([0, 1]), "all")
