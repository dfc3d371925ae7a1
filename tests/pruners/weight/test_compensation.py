"""Compensation against least squares over the inputs themselves."""

import numpy as np
import pytest
import torch

from prunery.errors import InputError
from prunery.pruners.weight.compensation import bias_of, refit, relative_error

KEPT, GONE = [0, 2, 3, 6, 7], [1, 4, 5]


def correlated(tokens=400, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((4, 8))
    x = rng.standard_normal((tokens, 4)) @ mix + 0.3 * rng.standard_normal((tokens, 8)) + mean
    return x, rng.standard_normal((6, 8))


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array, np.float32)) for array in arrays]


def error(x, w, made, bias=0.0):
    """Relative output error, by its definition."""
    full = np.zeros_like(w)
    full[:, KEPT] = made
    return np.linalg.norm(x @ full.T + bias - x @ w.T) / np.linalg.norm(x @ w.T)


def test_bias_is_the_mean_of_what_was_removed():
    x, w = correlated(mean=1.5)
    weight, mean = tensors(w, x.mean(0))
    expected = (x[:, GONE] @ w[:, GONE].T).mean(0)
    found = bias_of(weight, mean, torch.tensor(GONE))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_refit_is_ridge_regression_towards_the_kept_weights():
    x, w = correlated()
    weight, gram = tensors(w, x.T @ x)
    ridge = 0.05 * np.trace(x[:, KEPT].T @ x[:, KEPT]) / len(KEPT)
    rows = np.concatenate([x[:, KEPT], np.sqrt(ridge) * np.eye(len(KEPT))])
    target = np.concatenate([x @ w.T, np.sqrt(ridge) * w[:, KEPT].T])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0].T
    found = refit(weight, gram, torch.tensor(KEPT), damp=0.05)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_refit_is_no_worse_than_the_bias_which_is_no_worse_than_nothing():
    x, w = correlated(mean=0.5)
    weight, gram, mean = tensors(w, x.T @ x, x.mean(0))
    bias = bias_of(weight, mean, torch.tensor(GONE)).numpy()
    again = refit(weight, gram, torch.tensor(KEPT), damp=1e-4).numpy()
    none = error(x, w, w[:, KEPT])
    with_bias = error(x, w, w[:, KEPT], bias)
    assert error(x, w, again) < with_bias < none


def test_refit_of_inputs_that_nothing_is_known_about_leaves_the_weights():
    weight = torch.randn(3, 4)
    found = refit(weight, torch.zeros(4, 4), torch.tensor([0, 3]))
    assert torch.equal(found, weight[:, [0, 3]])


def test_refit_survives_a_gram_without_full_rank():
    x, w = correlated(tokens=3)
    weight, gram = tensors(w, x.T @ x)
    found = refit(weight, gram, torch.tensor(KEPT), damp=0.0)
    assert error(x, w, found.numpy()) < error(x, w, w[:, KEPT])


def test_refit_refuses_what_is_no_gram():
    weight = torch.randn(3, 4)
    for gram in (torch.full((4, 4), torch.nan), torch.eye(5), -torch.eye(4)):
        with pytest.raises(InputError, match="gram"):
            refit(weight, gram, torch.tensor([0, 1]))


@pytest.mark.parametrize("with_bias", [False, True])
def test_relative_error_is_that_of_the_outputs(with_bias):
    x, w = correlated(mean=1.0)
    made = w.copy()
    made[:, GONE] = 0
    bias = np.full(6, 0.7) if with_bias else None
    weight, new, gram, mean = tensors(w, made, x.T @ x, x.mean(0))
    given = None if bias is None else tensors(bias)[0]
    found = relative_error(weight, new, gram, given, mean, len(x))
    assert found == pytest.approx(error(x, w, w[:, KEPT], 0 if bias is None else bias), rel=1e-3)


def test_relative_error_of_silence():
    weight, gram = torch.ones(2, 2), torch.zeros(2, 2)
    mean = torch.zeros(2)
    assert relative_error(weight, weight * 0, gram, None, mean, 5) == 0
    assert relative_error(weight, weight, gram, torch.ones(2), mean, 5) == float("inf")
