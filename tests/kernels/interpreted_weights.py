"""The Triton kernels over weights in Triton's interpreter: run by test_triton.py.

float32 and float16 only: the interpreter's product of bfloat16 is wrong.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import (
    gated_mlp_triton,
    hadamard_triton,
    int4_matmul,
    int4_triton,
    pack_int4,
    sparse_gated_mlp,
    unpack_mask,
    wanda_mask,
    wanda_triton,
)
from prunery.kernels.hadamard import hadamard

from .cases import distance
from .weight_cases import kept_of, layer, mlp, mlp_of, quantised, quantised_product, rotation_of

DTYPES = (torch.float32, torch.float16)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 90),
    keep=st.floats(0, 1),
    levels=st.sampled_from([None, 1]),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
def test_wanda_rows(rows, size, keep, levels, dtype, seed):
    weight, norm = layer(seed, rows, size, dtype, levels=levels)
    want = kept_of(weight, norm, size, math.ceil(round(keep * size, 9)))
    assert torch.equal(wanda_mask(weight, norm, keep=keep, impl="triton"), want)
    bits = wanda_mask(weight, norm, keep=keep, packed=True, impl="triton")
    assert torch.equal(unpack_mask(bits, size), want)
    assert torch.equal(bits, wanda_mask(weight, norm, keep=keep, packed=True))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 9),
    pattern=st.sampled_from([(2, 4), (4, 8), (3, 5), (3, 3), (7, 16)]),
    levels=st.sampled_from([None, 1]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_wanda_patterns(rows, groups, pattern, levels, dtype, seed):
    n, m = pattern
    weight, norm = layer(seed, rows, groups * m, dtype, levels=levels)
    turned = weight.T.contiguous().T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanda_triton, "GROUPS", 4)
        made = wanda_mask(turned, norm, pattern=pattern, impl="triton")
        bits = wanda_mask(weight, norm, pattern=pattern, packed=True, impl="triton")
    assert torch.equal(made, kept_of(weight, norm, m, n))
    assert torch.equal(unpack_mask(bits, groups * m), made)


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"pattern": (2, 4)}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_wanda_refuses_what_is_not_finite(bad, options):
    weight, norm = layer(1, 3, 8)
    norm[5], weight[2, 5] = 0.0, bad
    with pytest.raises(InputError, match="row 2, column 5"):
        wanda_mask(weight, norm, **options, impl="triton")


def test_wanda_of_nothing_and_of_very_long_rows(monkeypatch):
    weight, norm = layer(1, 3, 8)
    assert wanda_mask(weight[:0], norm, keep=0.5, impl="triton").shape == (0, 8)
    monkeypatch.setattr(wanda_triton, "LONGEST", 7)
    made = wanda_mask(weight, norm, keep=0.5, impl="triton")
    assert torch.equal(made, kept_of(weight, norm, 8, 4))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    odd=st.sampled_from([1, 3]),
    power=st.integers(0, 6),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    turned=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_hadamard(rows, odd, power, dtype, turned, inverse, seed):
    size, block = odd * 2**power, 2**power
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=made).to(dtype)
    signs = torch.randint(0, 2, (size,), generator=made).float() * 2 - 1 if turned else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard_triton, "CELLS", 64)
        found = hadamard(x, signs=signs, inverse=inverse, impl="triton")
    assert found.dtype == dtype
    slack = 1e-5 + (0.0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
    assert distance(found, rotation_of(x, block, signs, inverse)) <= slack


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small tiles make many programs and parts."""
    monkeypatch.setattr(gated_mlp_triton, "NEURONS", 4)
    monkeypatch.setattr(gated_mlp_triton, "INNER", 8)
    monkeypatch.setattr(gated_mlp_triton, "COLUMNS", 8)
    monkeypatch.setattr(gated_mlp_triton, "PROGRAMS", 6)
    monkeypatch.setattr(int4_triton, "OUTPUTS", 16)
    monkeypatch.setattr(int4_triton, "INNER", 16)
    monkeypatch.setattr(int4_triton, "PROGRAMS", 6)


@pytest.mark.parametrize("rule", ["gate", "product"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@settings(max_examples=4, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 20),
    neurons=st.integers(1, 30),
    columns=st.integers(1, 20),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
def test_gated_mlp(rows, size, neurons, columns, dtype, seed, activation, rule):
    given_ = mlp(seed, rows, size, neurons, columns, dtype)
    limit = torch.rand(neurons, generator=torch.Generator().manual_seed(seed)) * 0.5
    want, nearest = mlp_of(*given_, limit, activation, rule)
    assume(nearest > 1e-4)
    options = {"activation": activation, "rule": rule, "impl": "triton"}
    made = sparse_gated_mlp(*given_, limit, **options)
    slack = 1e-5 + (0.0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
    assert distance(made, want) <= slack
    assert torch.equal(made, sparse_gated_mlp(*given_, limit, **options))


def test_gated_mlp_reads_live_rows_alone():
    """NaN in a dead neuron's weights is not read; in a live one's it is seen."""
    x, gate, up, down_t = mlp(3, 1, 12, 10, 9)
    alive = torch.nn.functional.silu(gate @ x[0]).abs() > 0.1
    want, _ = mlp_of(x, gate, up, down_t, 0.1)
    assert alive.any() and not alive.all()
    up[~alive], down_t[~alive] = math.nan, math.nan
    assert distance(sparse_gated_mlp(x, gate, up, down_t, 0.1, impl="triton"), want) < 1e-5
    gate[2] = math.nan
    assert sparse_gated_mlp(x, gate, up, down_t, 0.1, impl="triton").isnan().all()


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 70]),
    outputs=st.integers(1, 40),
    size=st.integers(1, 90),
    group_size=st.sampled_from([8, 24, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    shifted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_int4(rows, outputs, size, group_size, dtype, shifted, seed):
    x, values, scale, zero = quantised(seed, rows, outputs, size, group_size, dtype, shifted)
    want = quantised_product(x, values, scale, zero, group_size)
    made = int4_matmul(x, pack_int4(values), scale, zero, group_size, impl="triton")
    assert made.dtype == dtype
    reach = float(want.abs().max()) if want.numel() else 0.0
    assert distance(made, want) <= 8 * torch.finfo(dtype).eps * (reach + 1)


def test_int4_of_one_group_a_row():
    x, values, scale, zero = quantised(1, 2, 3, 13, 13, torch.float32, True)
    made = int4_matmul(x, pack_int4(values), scale, zero, 13, impl="triton")
    assert distance(made, quantised_product(x, values, scale, zero, 13)) < 1e-5
