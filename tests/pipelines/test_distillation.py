"""The distillation loss: its limits, its mean, and a gradient whose size the temperature keeps."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from prunery.errors import InputError
from prunery.pipelines.distillation import distillation_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, requires_grad=True)
    teacher = torch.randn(5, 4, generator=generator).log_softmax(dim=1)
    return logits, torch.tensor([0, 1, 2, 3, 0]), teacher


def test_a_case_by_hand():
    # Student uniform over two classes; teacher 3/4 and 1/4, at t = 2 in the ratio sqrt(3) to 1.
    logits, label = torch.zeros(1, 2), torch.tensor([1])
    teacher = torch.tensor([[0.75, 0.25]]).log()
    high = math.sqrt(3) / (1 + math.sqrt(3))
    divergence = high * math.log(2 * high) + (1 - high) * math.log(2 * (1 - high))
    found = distillation_loss(logits, label, teacher, alpha=0.25, temperature=2.0)
    assert float(found) == pytest.approx(0.75 * math.log(2) + 0.25 * 4 * divergence, rel=1e-6)


def test_alpha_0_is_the_plain_loss_and_needs_no_teacher(batch):
    logits, label, teacher = batch
    plain = F.cross_entropy(logits, label)
    for given in (teacher, None):
        found = distillation_loss(logits, label, given, alpha=0.0, temperature=3.0)
        assert torch.allclose(found, plain)


def test_alpha_1_never_looks_at_the_labels(batch):
    logits, _, teacher = batch
    nonsense = torch.full((5,), 99)  # would be out of range
    found = distillation_loss(logits, nonsense, teacher, alpha=1.0, temperature=1.0)
    wanted = (teacher.exp() * (teacher - logits.log_softmax(dim=1))).sum(dim=1).mean()
    assert torch.allclose(found, wanted)
    assert float(distillation_loss(teacher, nonsense, teacher, alpha=1.0, temperature=2.0)) < 1e-6


def test_it_is_a_mean_over_rows_and_not_over_classes(batch):
    logits, label, teacher = batch
    rows = [
        distillation_loss(
            logits[i : i + 1], label[i : i + 1], teacher[i : i + 1], alpha=0.4, temperature=2.0
        )
        for i in range(5)
    ]
    whole = distillation_loss(logits, label, teacher, alpha=0.4, temperature=2.0)
    assert torch.allclose(whole, torch.stack(rows).mean())
    weight = torch.tensor([2.0, 0.0, 1.0, 0.5, 3.0])
    weighed = distillation_loss(logits, label, teacher, alpha=0.4, temperature=2.0, weight=weight)
    assert torch.allclose(weighed, (torch.stack(rows) * weight).sum() / 5)


def test_the_teacher_is_tempered_from_its_log_probabilities(batch):
    logits, label, teacher = batch
    shifted = teacher + torch.arange(5.0)[:, None]  # logits, up to a constant a row
    a, b = (
        distillation_loss(logits, label, t, alpha=1.0, temperature=4.0) for t in (teacher, shifted)
    )
    assert torch.allclose(a, b, atol=1e-6)


def test_the_temperature_keeps_the_size_of_the_gradient():
    """Near equal logits the gradient of t² KL is (z - z_t) / C at any temperature above them."""
    student = torch.tensor([[0.01, -0.02, 0.01]], requires_grad=True)
    teacher = torch.tensor([[-0.02, 0.0, 0.02]])
    label = torch.tensor([0])
    found = []
    for temperature in (1.0, 2.0, 8.0):
        loss = distillation_loss(student, label, teacher, alpha=1.0, temperature=temperature)
        found.append(torch.autograd.grad(loss, student)[0].numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=0.05)
    np.testing.assert_allclose(found[0], found[2], rtol=0.05)
    np.testing.assert_allclose(found[2], (student - teacher).detach().numpy() / 3, rtol=0.02)


def test_the_gradient_pulls_towards_the_teacher(batch):
    logits, label, teacher = batch
    loss = distillation_loss(logits, label, teacher, alpha=1.0, temperature=1.0)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(gradient, (logits.softmax(dim=1) - teacher.exp()) / 5, atol=1e-6)


def test_what_does_not_fit_is_refused(batch):
    logits, label, teacher = batch
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="`alpha`"):
            distillation_loss(logits, label, teacher, alpha=alpha, temperature=1.0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="`temperature`"):
            distillation_loss(logits, label, teacher, alpha=0.5, temperature=temperature)
    with pytest.raises(InputError, match="needs a teacher"):
        distillation_loss(logits, label, None, alpha=0.5, temperature=1.0)
