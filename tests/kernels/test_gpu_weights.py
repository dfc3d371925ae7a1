"""The kernels over weights on a real GPU: numbers and determinism. Skipped where there is none."""

import math

import pytest
import torch

from prunery.kernels import (
    Gate24,
    int4_matmul,
    pack_int4,
    prepare_int4,
    sparse24_linear,
    sparse_gated_mlp,
    unpack_mask,
    wanda_mask,
)
from prunery.kernels.hadamard import hadamard
from prunery.kernels.sparse24 import sparse24

from .cases import distance
from .weight_cases import (
    kept_of,
    layer,
    mlp,
    mlp_of,
    quantised,
    quantised_product,
    rotation_of,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("torch", "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("size", [1, 100, 4096, 11008])
def test_wanda(size, levels, dtype, impl):
    weight, norm = layer(1, 5, size, dtype, levels=levels)
    want = kept_of(weight, norm, size, math.ceil(round(0.37 * size, 9)))
    made = wanda_mask(weight.cuda(), norm.cuda(), keep=0.37, impl=impl)
    assert torch.equal(made.cpu(), want)
    bits = wanda_mask(weight.cuda(), norm.cuda(), keep=0.37, packed=True, impl=impl)
    assert torch.equal(unpack_mask(bits, size).cpu(), want)
    if size % 8 == 0:
        for n, m in ((2, 4), (4, 8)):
            made = wanda_mask(weight.cuda(), norm.cuda(), pattern=(n, m), impl=impl)
            assert torch.equal(made.cpu(), kept_of(weight, norm, m, n))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 96, 256])
def test_hadamard(size, dtype, impl):
    x = torch.randn(7, size).to(dtype)
    signs = torch.where(torch.arange(size) % 3 == 0, -1.0, 1.0)
    for inverse in (False, True):
        made = hadamard(x.cuda(), signs=signs.cuda(), inverse=inverse, impl=impl)
        want = rotation_of(x, size & -size, signs, inverse)
        assert distance(made.cpu(), want) <= 1e-5 + 8 * torch.finfo(dtype).eps


def test_hadamard_at_its_largest():
    for size in (16384, 32768):  # the second goes to torch
        x = torch.randn(3, size, device="cuda")
        back = hadamard(hadamard(x, impl="triton"), inverse=True, impl="triton")
        assert distance(back.cpu(), x.cpu()) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["gate", "product"])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_gated_mlp(rows, rule, dtype, impl):
    arguments = mlp(2, rows, 40, 70, 50, dtype)
    want, nearest = mlp_of(*arguments, 0.1, rule=rule)
    one, two = (
        sparse_gated_mlp(*(part.cuda() for part in arguments), 0.1, rule=rule, impl=impl)
        for _ in range(2)
    )
    assert torch.equal(one, two)
    if nearest > 30 * torch.finfo(dtype).eps:
        assert distance(one.cpu(), want) <= 60 * torch.finfo(dtype).eps + 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rows", [1, 70])
def test_int4(rows, shifted, dtype, impl):
    x, values, scale, zero = quantised(1, rows, 100, 300, 32, dtype, shifted)
    want = quantised_product(x, values, scale, zero, 32)
    given = [x.cuda(), pack_int4(values.cuda()), scale.cuda(), zero.cuda() if shifted else None]
    one, two = (int4_matmul(*given, 32, impl=impl) for _ in range(2))
    assert torch.equal(one, two)
    assert distance(one.cpu(), want) <= 8 * torch.finfo(dtype).eps * (float(want.abs().max()) + 1)


@pytest.mark.parametrize("shifted", [False, True])
def test_torchs_int4(shifted):
    x, values, scale, zero = quantised(1, 4, 128, 256, 64, torch.bfloat16, shifted)
    want = quantised_product(x, values, scale, zero, 64)
    scale, zero = scale.cuda(), zero.cuda() if shifted else None
    packed = pack_int4(values.cuda())
    prepared = prepare_int4(packed, scale, zero, 64, 256)
    assert prepared is not None
    made = int4_matmul(x.cuda(), packed, scale, zero, 64, prepared=prepared)
    assert distance(made.cpu(), want) <= 0.02 * float(want.abs().max())


def test_sparse24():
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    weight = weight * wanda_mask(weight, torch.ones(512, device="cuda"), pattern=(2, 4))
    made = sparse24(weight, gate=Gate24({(256, 512): 64}))
    assert made.compressed is not None
    for rows in (1, 64, 130):
        x = torch.randn(2, rows // 2 or 1, 512, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ weight.double().T
        found = sparse24_linear(x, made)
        assert distance(found.cpu(), want.cpu()) <= 0.02 * float(want.abs().max())
