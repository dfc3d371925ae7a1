"""wanda_mask: worked by hand, against the words, ties, borders, bits, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import column_square_sums, pack_mask, unpack_mask, wanda_mask, wanda_torch

from .weight_cases import kept_of, layer

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_blocks(monkeypatch):
    """Few cells a block, the histogram for narrow rows too, and seldom too much at the border."""
    monkeypatch.setattr(wanda_torch, "CELLS", 150)
    monkeypatch.setattr(wanda_torch, "NARROW", 3)
    monkeypatch.setattr(wanda_torch, "MANY", 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """Scores of row 0: 3, 2, 0, 4; of row 1: 3, 2, 3, 0."""
    weight = torch.tensor([[-3.0, 1.0, 5.0, 2.0], [3.0, -1.0, 0.0, 0.0]])
    weight[1, 2] = 0.0
    norm = torch.tensor([1.0, 2.0, 0.0, 2.0])
    made = wanda_mask(weight, norm, keep=0.5, impl=impl)
    assert made.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert made.dtype == torch.bool
    # Of row 0's pairs 3 | 2 and 0 | 4; of row 1's 3 | 2 and 0 | 0, the left one.
    made = wanda_mask(weight, norm, pattern=(1, 2), impl=impl)
    assert made.tolist() == [[True, False, False, True], [True, False, True, False]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("size", "keep", "count"),
    [(100, 0.07, 7), (100, 0.071, 8), (10, 0.0, 0), (10, 1.0, 10), (3, 0.5, 2), (100, 0.29, 29)],
)
def test_counts_are_exact(size, keep, count, impl):
    weight, norm = layer(1, 6, size)
    assert (wanda_mask(weight, norm, keep=keep, impl=impl).sum(1) == count).all()
    equal = wanda_mask(torch.ones(2, size), torch.ones(size), keep=keep, impl=impl)
    assert equal[:, :count].all() and not equal[:, count:].any()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 90),
    keep=st.floats(0, 1),
    levels=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from(DTYPES),
    whole=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_share_of_each_row(rows, size, keep, levels, dtype, whole, seed):
    weight, norm = layer(seed, rows, size, dtype, levels=levels)
    count = math.ceil(round(keep * size, 9))
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(wanda_torch, "CELLS", 150)
            patch.setattr(wanda_torch, "NARROW", 3)
            patch.setattr(wanda_torch, "MANY", 2)
        made = wanda_mask(weight, norm, keep=keep)
        bits = wanda_mask(weight, norm, keep=keep, packed=True)
    assert torch.equal(made, kept_of(weight, norm, size, count))
    assert torch.equal(unpack_mask(bits, size), made)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 12),
    pattern=st.sampled_from([(2, 4), (4, 8), (1, 2), (3, 5), (3, 3), (7, 16), (12, 12)]),
    levels=st.sampled_from([None, 1]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_patterns(rows, groups, pattern, levels, dtype, seed):
    n, m = pattern
    weight, norm = layer(seed, rows, groups * m, dtype, levels=levels)
    want = kept_of(weight, norm, m, n)
    for impl in IMPLS if levels else ("torch",):
        assert torch.equal(wanda_mask(weight, norm, pattern=pattern, impl=impl), want)


@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
def test_scores_of_any_size(spread, small_blocks):
    """Scores far below the row's highest share the lowest bucket, and are told apart in it."""
    made = torch.Generator().manual_seed(0)
    weight = torch.exp2(torch.randint(-60, 1, (8, 64), generator=made).float()) * spread
    norm = torch.rand(64, generator=made) + 0.5
    for keep in (0.05, 0.5, 0.9):
        count = math.ceil(round(keep * 64, 9))
        assert torch.equal(wanda_mask(weight, norm, keep=keep), kept_of(weight, norm, 64, count))


def test_wide_rows_take_the_histogram(monkeypatch):
    weight, norm = layer(3, 3, 2000)
    sorted_rows = []
    plain = wanda_torch._partly_sorted
    monkeypatch.setattr(
        wanda_torch, "_partly_sorted", lambda *a: sorted_rows.append(1) or plain(*a)
    )
    made = wanda_mask(weight, norm, keep=0.37)
    assert not sorted_rows
    assert torch.equal(made, kept_of(weight, norm, 2000, 740))
    weight[:, 5:1900] = 0.0  # the border lies among equals: rows are sorted instead
    made = wanda_mask(weight, norm, keep=0.37)
    assert sorted_rows
    assert torch.equal(made, kept_of(weight, norm, 2000, 740))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_gradients_and_nothing(impl):
    weight, norm = layer(5, 7, 12)
    want = wanda_mask(weight, norm, keep=0.4, impl=impl)
    turned = weight.T.contiguous().T.requires_grad_()
    apart = torch.stack([norm, -norm], 1)[:, 0]
    assert torch.equal(wanda_mask(turned, apart, keep=0.4, impl=impl), want)
    assert wanda_mask(weight[:0], norm, keep=0.4, impl=impl).shape == (0, 12)
    assert wanda_mask(weight[:, :0], norm[:0], keep=0.4, impl=impl).shape == (7, 0)


def test_magnitude_is_a_norm_of_ones():
    weight, _ = layer(6, 5, 30)
    made = wanda_mask(weight, torch.full((30,), 7.0), keep=0.5)
    border = weight.abs().sort(1, descending=True).values[:, 14:15]
    assert torch.equal(made, weight.abs() >= border)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 40),
    size=st.integers(0, 9),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    seed=st.integers(0, 2**20),
)
def test_sums_of_squares(rows, size, dtype, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=made).to(dtype)
    out = torch.rand(size, generator=made)
    want = out.double() + sum((row.double() ** 2 for row in x), torch.zeros(size).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanda_torch, "CELLS", 7 * max(1, size))
        column_square_sums(x.T.contiguous().T.requires_grad_(), out)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)


def test_sums_of_squares_refuse():
    x = torch.ones(3, 2)
    with pytest.raises(InputError, match=r"x is \(T, in\) floating; found \(3,\)"):
        column_square_sums(x[:, 0], torch.zeros(2))
    with pytest.raises(InputError, match=r"out is \(2,\) float32 .* torch.float64"):
        column_square_sums(x, torch.zeros(2).double())
    with pytest.raises(InputError, match=r"out is \(2,\) .* found \(3,\)"):
        column_square_sums(x, torch.zeros(3))


def test_bits_are_numpys():
    mask = torch.rand(5, 21, generator=torch.Generator().manual_seed(0)) > 0.5
    bits = pack_mask(mask)
    assert bits.numpy().tolist() == np.packbits(mask.numpy(), 1, bitorder="little").tolist()
    assert torch.equal(unpack_mask(bits, 21), mask)


WEIGHT, NORM = torch.ones(2, 6), torch.ones(6)


def changed(tensor, place, value):
    made = tensor.clone()
    made[place] = value
    return made


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("weight", "norm", "options", "words"),
    [
        (WEIGHT, NORM[:3], {"keep": 0.5}, r"\(2, 6\) and \(3,\)"),
        (WEIGHT.int(), NORM, {"keep": 0.5}, "weight is of a floating dtype"),
        (WEIGHT, NORM.to("meta"), {"keep": 0.5}, "norm is on cpu; found meta"),
        (WEIGHT, changed(NORM, 4, -1.0), {"keep": 0.5}, "found -1.0 at column 4"),
        (WEIGHT, changed(NORM, 2, math.nan), {"keep": 0.5}, "found nan at column 2"),
        (changed(WEIGHT, (1, 3), math.nan), NORM, {"keep": 0.5}, "nan .* row 1, column 3"),
        (changed(WEIGHT, (0, 5), -math.inf), NORM, {"pattern": (1, 2)}, "-inf .* row 0, column 5"),
        (
            changed(WEIGHT, (1, 0), math.inf),
            changed(NORM, 0, 0.0),
            {"keep": 0.5},
            "inf times norm 0.0 at row 1, column 0",
        ),
        (WEIGHT, NORM, {}, "one of keep and pattern; found keep=None"),
        (WEIGHT, NORM, {"keep": 0.5, "pattern": (1, 2)}, "one of keep and pattern"),
        (WEIGHT, NORM, {"keep": 1.1}, r"in \[0, 1\]; found 1.1"),
        (WEIGHT, NORM, {"keep": math.nan}, r"in \[0, 1\]; found nan"),
        (WEIGHT, NORM, {"pattern": (2, 4)}, "a multiple of 4; found 6"),
        (WEIGHT, NORM, {"pattern": (3, 2)}, r"0 < n <= m; found \(3, 2\)"),
    ],
)
def test_refusals_say_what_was_found(weight, norm, options, words, impl):
    with pytest.raises(InputError, match=words):
        wanda_mask(weight, norm, **options, impl=impl)


def test_bits_are_refused_by_shape():
    with pytest.raises(InputError, match=r"\(out, in\) bool; found \(2, 6\) torch.float32"):
        pack_mask(WEIGHT)
    with pytest.raises(InputError, match=r"9 columns are \(out, 2\) uint8; found \(2, 1\)"):
        unpack_mask(pack_mask(WEIGHT > 0), 9)
