"""int4: the packing of compressed-tensors, products against the words, torch's kernel, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import (
    int4_library,
    int4_matmul,
    int4_torch,
    pack_int4,
    prepare_int4,
    unpack_int4,
)

from .cases import distance
from .weight_cases import quantised, quantised_product

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_words_are_those_of_compressed_tensors():
    """Taken from its pack_to_int32(values, 4), version 0.19; and by hand, nibble by nibble."""
    values = torch.tensor([[-8, -7, -1, 0, 1, 7, 3, -3, 5, -2]], dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.tolist() == [[1543079696, 109]]
    assert packed.dtype == torch.int32
    assert packed[0, 1].item() == (5 + 8) + ((-2 + 8) << 4)
    assert pack_int4(torch.full((1, 8), 7, dtype=torch.int8)).tolist() == [[-1]]


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 5), size=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_there_and_back(rows, size, seed):
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, size), generator=made).to(torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (rows, -(-size // 8))
    assert torch.equal(unpack_int4(packed, size), values)
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        whole = sum((value + 8) << (4 * place) for place, value in enumerate(row))
        assert whole == sum((word % 2**32) << (32 * place) for place, word in enumerate(words))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    outputs=st.integers(0, 20),
    size=st.integers(1, 70),
    group_size=st.sampled_from([8, 16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    shifted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_torch_is_the_product(rows, outputs, size, group_size, dtype, shifted, seed):
    x, values, scale, zero = quantised(seed, rows, outputs, size, group_size, dtype, shifted)
    want = quantised_product(x, values, scale, zero, group_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int4_torch, "CPU_CELLS", 5 * size)
        made = int4_matmul(x, pack_int4(values), scale, zero, group_size)
    plain = int4_matmul(x, pack_int4(values), scale, zero, group_size, impl="reference")
    assert made.dtype == plain.dtype == dtype
    reach = float(want.abs().max()) if want.numel() else 0.0
    eps = torch.finfo(dtype).eps
    assert distance(plain, want) <= eps * reach + 1e-12
    # Weights are rounded to the dtype of x, and so is the sum.
    assert distance(made, want) <= 8 * eps * (reach + 1)


def test_one_group_a_row_of_any_length():
    x, values, scale, zero = quantised(1, 2, 3, 13, 13, torch.float32, True)
    want = quantised_product(x, values, scale, zero, 13)
    for group_size in (13, 1000):
        made = int4_matmul(x, pack_int4(values), scale, zero, group_size)
        assert distance(made, want) < 1e-5


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("outputs", "size", "group_size"), [(16, 64, 32), (48, 512, 128)])
def test_torchs_kernel(outputs, size, group_size, shifted, monkeypatch):
    x, values, scale, zero = quantised(2, 4, outputs, size, group_size, torch.bfloat16, shifted)
    packed = pack_int4(values)
    prepared = prepare_int4(packed, scale, zero, group_size, size)
    if prepared is None:
        pytest.skip("this torch has no 4-bit product for CPUs")
    want = quantised_product(x, values, scale, zero, group_size)
    used = []
    product = int4_library.product
    monkeypatch.setattr(int4_library, "product", lambda *a: used.append(1) or product(*a))
    made = int4_matmul(x, packed, scale, zero, group_size, prepared=prepared)
    assert used == [1]
    assert distance(made, want) <= 0.02 * float(want.abs().max())
    # Not for another dtype, not for many rows, and not where an implementation is named.
    int4_matmul(x.float(), packed, scale, zero, group_size, prepared=prepared)
    int4_matmul(x.repeat(3, 1), packed, scale, zero, group_size, prepared=prepared)
    int4_matmul(x, packed, scale, zero, group_size, prepared=prepared, impl="torch")
    assert used == [1]


@pytest.mark.parametrize(("outputs", "size", "group_size"), [(15, 64, 32), (16, 64, 16)])
def test_torchs_kernel_takes_no_such_shape(outputs, size, group_size):
    _, values, scale, zero = quantised(2, 1, outputs, size, group_size, torch.bfloat16, False)
    assert prepare_int4(pack_int4(values), scale, zero, group_size, size) is None


def test_a_kernel_that_disagrees_is_not_used(monkeypatch):
    _, values, scale, zero = quantised(2, 1, 16, 64, 32, torch.bfloat16, True)
    monkeypatch.setattr(int4_library, "product", lambda x, made: torch.ones(1, 16).bfloat16())
    assert prepare_int4(pack_int4(values), scale, zero, 32, 64) is None


def test_strides_gradients_and_autocast():
    x, values, scale, zero = quantised(3, 4, 6, 32, 8, torch.float32, True)
    packed = pack_int4(values)
    want = int4_matmul(x, packed, scale, zero, 8)
    turned = [one.T.contiguous().T for one in (x, packed, scale, zero)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = int4_matmul(turned[0].requires_grad_(), *turned[1:], 8)
    assert distance(made, want) < 1e-6 and not made.requires_grad


X, PACKED, SCALE = torch.ones(2, 16), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X[:, :8], PACKED, SCALE, None, 8), r"\(out, 1\) int32 for 8 inputs; found \(3, 2\)"),
        ((X, PACKED.long(), SCALE, None, 8), "found .* torch.int64"),
        ((X.int(), PACKED, SCALE, None, 8), "x is .* torch.int32"),
        ((X, PACKED, SCALE[:, :1], None, 8), r"scale is \(3, 2\) .* found \(3, 1\)"),
        ((X, PACKED, SCALE, None, 16), r"scale is \(3, 1\) .* found \(3, 2\)"),
        ((X, PACKED, SCALE, None, 12), "a multiple of 8, or all 16 inputs; found 12"),
        ((X, PACKED, SCALE, None, 0), "found 0"),
        ((X, PACKED, SCALE, SCALE, 8), r"zero is \(3, 2\) int8 .* torch.float32"),
    ],
)
def test_refusals_say_what_was_found(arguments, words):
    with pytest.raises(InputError, match=words):
        int4_matmul(*arguments)


def test_packing_refuses():
    values = torch.zeros(2, 5, dtype=torch.int8)
    values[1, 3] = 8
    with pytest.raises(InputError, match="found 8 at row 1, column 3"):
        pack_int4(values)
    with pytest.raises(InputError, match=r"int8; found \(2, 5\) torch.int32"):
        pack_int4(values.int())
    with pytest.raises(InputError, match=r"\(out, 3\) int32 for 17 inputs"):
        unpack_int4(PACKED, 17)
