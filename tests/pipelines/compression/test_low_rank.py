import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunery.errors import ModelError
from prunery.pipelines.compression.low_rank import (
    LowRank,
    add_low_rank,
    drop_low_rank,
    fold_low_rank,
)


def layer(transposed, zeros=True):
    generator = torch.Generator().manual_seed(1)
    made = Conv1D(12, 9) if transposed else nn.Linear(9, 12)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if zeros:
            made.weight[torch.rand(made.weight.shape, generator=generator) < 0.4] = 0
    return made


def holder(transposed, zeros=True):
    made = nn.Module()
    made.inner = nn.Module()
    made.inner.matrix = layer(transposed, zeros)
    return made


def wrap(block, transposed, rank=3, keep_zeros=True):
    add_low_rank(
        block,
        ["inner.matrix"],
        rank=rank,
        alpha=6.0,
        keep_zeros=keep_zeros,
        transposed=transposed,
        generator=torch.Generator().manual_seed(2),
    )
    with torch.no_grad():
        block.inner.matrix.lora_B.copy_(torch.randn(block.inner.matrix.lora_B.shape))
    return block.inner.matrix


@pytest.mark.parametrize("transposed", [False, True])
def test_a_masked_update_is_the_papers_formula_and_leaves_zeros(transposed):
    block = holder(transposed)
    before = block.inner.matrix.weight.detach().numpy().astype(np.float64)
    bias = block.inner.matrix.bias.detach().numpy().astype(np.float64)
    part = wrap(block, transposed)
    a, b = (p.detach().numpy().astype(np.float64) for p in (part.lora_A, part.lora_B))
    update = 6.0 / 3 * (b @ a)
    wanted = before + (update.T if transposed else update) * (before != 0)
    x = np.random.default_rng(0).normal(size=(2, 5, 9))
    told = x @ (wanted if transposed else wanted.T) + bias
    found = part(torch.from_numpy(x).float()).detach().numpy()
    np.testing.assert_allclose(found, told, rtol=1e-4, atol=1e-4)
    assert fold_low_rank(block) == ["inner.matrix"]
    assert not isinstance(block.inner.matrix, LowRank)
    after = block.inner.matrix.weight.detach().numpy()
    np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5)
    assert ((after == 0) == (before == 0)).all() and (before == 0).any()
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_a_folded_update_gives_what_the_factors_gave(transposed, keep_zeros):
    block = holder(transposed)
    part = wrap(block, transposed, keep_zeros=keep_zeros)
    assert part.masked == keep_zeros
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = block.inner.matrix(x)
        fold_low_rank(block)
        torch.testing.assert_close(block.inner.matrix(x), before, rtol=1e-5, atol=1e-5)


def test_an_unmasked_update_has_the_rank_asked_for_and_fills_zeros():
    block = holder(False)
    before = block.inner.matrix.weight.detach().clone().double()
    wrap(block, False, rank=3, keep_zeros=False)
    fold_low_rank(block)
    update = block.inner.matrix.weight.detach().double() - before
    singular = torch.linalg.svdvals(update)
    assert singular[2] > 0.1 and singular[3] < 1e-5
    assert (block.inner.matrix.weight == 0).sum() == 0


def test_factors_start_as_no_update_and_can_be_taken_away():
    block = holder(False)
    before = block.inner.matrix.weight.detach().clone()
    x = torch.randn(4, 9)
    wanted = block.inner.matrix(x)
    made = layer(False)
    add = {"rank": 2, "alpha": 4.0, "transposed": False}
    fresh = LowRank(made, masked=True, generator=torch.Generator().manual_seed(0), **add)
    torch.testing.assert_close(fresh(x), made(x))
    wrap(block, False)
    assert not torch.allclose(block.inner.matrix(x), wanted)
    drop_low_rank(block)
    assert torch.equal(block.inner.matrix.weight, before)


def test_a_matrix_without_zeros_needs_no_mask_and_a_rank_is_cut_to_the_sides():
    block = holder(False, zeros=False)
    part = wrap(block, False, rank=100)
    assert not part.masked
    assert part.lora_A.shape == (9, 9) and part.scale == pytest.approx(6.0 / 9)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ModelError, match="rank of at least 1, found 0"):
        wrap(holder(False), False, rank=0)


def test_only_the_factors_get_gradients():
    block = holder(False)
    part = wrap(block, False)
    part(torch.randn(3, 9)).sum().backward()
    assert part.lora_A.grad is not None and part.lora_B.grad is not None
    assert part.base.weight.grad is None
