"""hadamard: the matrix bit by bit, worked by hand, against the words, there and back, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import block_of, hadamard_matrix, hadamard_torch
from prunery.kernels.hadamard import hadamard

from .cases import distance
from .weight_cases import rotation_of

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """4 coordinates in one block, then in two blocks of 2, then 6 in three."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    made = hadamard(x, impl=impl)
    assert made[0].tolist() == pytest.approx([5.0, -1.0, -2.0, 0.0])
    made = hadamard(x, block=2, impl=impl) * math.sqrt(2)
    assert made[0].tolist() == pytest.approx([3.0, -1.0, 7.0, -1.0])
    made = hadamard(torch.arange(6.0), impl=impl) * math.sqrt(2)
    assert made.tolist() == pytest.approx([1.0, -1.0, 5.0, -1.0, 9.0, -1.0])
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    made = hadamard(x, signs=signs, impl=impl)
    assert made[0].tolist() == pytest.approx([3.0, 1.0, -4.0, 2.0])
    assert torch.equal(hadamard(x, block=1, impl=impl), x)


def test_blocks():
    assert [block_of(size) for size in (1, 7, 12, 64, 11008)] == [1, 1, 4, 64, 256]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    odd=st.sampled_from([1, 3, 5]),
    power=st.integers(0, 6),
    smaller=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_torch_is_the_rotation(rows, odd, power, smaller, dtype, turned, inverse, seed):
    size, block = odd * 2**power, 2 ** max(0, power - smaller)
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, size, generator=made).to(dtype)
    signs = torch.randint(0, 2, (size,), generator=made).float() * 2 - 1 if turned else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard_torch, "CELLS", 3 * size)
        found = hadamard(x, block=block, signs=signs, inverse=inverse)
    want = rotation_of(x, block, signs, inverse)
    assert found.dtype == dtype and found.shape == x.shape
    slack = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    # One rounding of the result, which is up to about 8.
    assert distance(found, want) <= slack + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_there_and_back_and_lengths(impl):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    signs = torch.where(torch.arange(48) % 3 == 0, -1.0, 1.0)
    made = hadamard(x, signs=signs, impl=impl)
    assert distance(hadamard(made, signs=signs, inverse=True, impl=impl), x) < 1e-5
    assert distance(made.norm(dim=1), x.norm(dim=1)) < 1e-5
    spike = torch.zeros(64)
    spike[5] = 8.0
    assert distance(hadamard(spike, impl=impl).abs(), torch.ones(64)) < 1e-6


def test_the_matrix_is_what_x_is_multiplied_by():
    signs = torch.where(torch.arange(24) % 5 == 0, -1.0, 1.0)
    x = torch.randn(4, 24, dtype=torch.float64)
    rotation = hadamard_matrix(24, signs=signs, dtype=torch.float64)
    assert rotation.dtype == torch.float64
    assert distance(hadamard(x, signs=signs), x @ rotation) < 1e-12
    assert distance(rotation @ rotation.T, torch.eye(24)) < 1e-12
    made = hadamard_matrix(4, block=2, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16 and not made[:2, 2:].any()
    assert hadamard_matrix(4).dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_gradients_and_autocast(impl):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    want = hadamard(x, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = hadamard(x.T.contiguous().T.requires_grad_(), impl=impl)
    assert torch.equal(made, want) and not made.requires_grad


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.zeros(2, 0), {}, r"d > 0; found \(2, 0\)"),
        (torch.zeros(2, 4).int(), {}, "found .* torch.int32"),
        (torch.zeros(2, 12), {"block": 8}, "divides 12, at most 4; found 8"),
        (torch.zeros(2, 12), {"block": 3}, "a power of two .* found 3"),
        (torch.zeros(2, 12), {"block": 0}, "found 0"),
        (torch.zeros(2, 4), {"signs": torch.ones(3)}, r"signs are \(4,\) .* found \(3,\)"),
        (torch.zeros(2, 4), {"signs": torch.zeros(4)}, r"\+1 and -1; found other"),
        (torch.zeros(2, 4), {"impl": "cuda"}, "impl is one of"),
    ],
)
def test_refusals_say_what_was_found(x, options, words):
    with pytest.raises(InputError, match=words):
        hadamard(x, **options)


def test_the_matrix_refuses_too():
    with pytest.raises(InputError, match=r"signs are \(4,\); found \(3,\)"):
        hadamard_matrix(4, signs=torch.ones(3))
    with pytest.raises(InputError, match="at least one coordinate; found 0"):
        hadamard_matrix(0)
