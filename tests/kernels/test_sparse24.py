"""sparse24: what is 2:4, the gate from timings, and products, dense on a CPU."""

import pytest
import torch

from prunery.errors import InputError
from prunery.kernels import Gate24, check_24, sparse24_linear, wanda_mask
from prunery.kernels.sparse24 import sparse24


def pruned(rows, size, seed=0):
    weight = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return weight * wanda_mask(weight, torch.ones(size), pattern=(2, 4))


def test_what_is_24():
    check_24(torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]))
    check_24(torch.zeros(3, 8, dtype=torch.bool))
    check_24(pruned(5, 32))
    check_24(torch.zeros(0, 8))
    broken = pruned(5, 32)
    broken[3, 8:12] = torch.tensor([1.0, 0.0, 2.0, -3.0])
    with pytest.raises(InputError, match="found 3 at row 3, columns 8 to 11"):
        check_24(broken)
    broken[3, 8:12] = torch.nan  # not 0, so it counts
    with pytest.raises(InputError, match="found 4 at row 3"):
        sparse24(broken)
    with pytest.raises(InputError, match=r"multiple of 4; found \(2, 6\)"):
        check_24(torch.zeros(2, 6))
    with pytest.raises(InputError, match="floating dtype; found torch.bool"):
        sparse24(torch.zeros(2, 4, dtype=torch.bool))


def test_the_product_on_a_cpu_is_dense():
    weight, bias = pruned(6, 64), torch.randn(6)
    x = torch.randn(2, 3, 64)
    made = sparse24(weight, gate=Gate24({(6, 64): 1}))
    assert made.compressed is None
    want = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(sparse24_linear(x, made, bias), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"x is \(..., 64\) torch.float32; found \(2, 3, 32\)"):
        sparse24_linear(x[..., :32], made)
    with pytest.raises(InputError, match="found .* torch.float64"):
        sparse24_linear(x.double(), made)


def timing(shape, rows, sparse, dense):
    return {"out": shape[0], "in": shape[1], "rows": rows, "sparse": sparse, "dense": dense}


def test_the_gate_is_read_from_timings():
    small, large = (256, 256), (4096, 4096)
    gate = Gate24.of_timings(
        [
            timing(large, 1, 9.0, 1.0),
            timing(large, 256, 0.6, 1.0),
            timing(large, 64, 0.7, 1.0),
            timing(large, 16, 0.96, 1.0),  # within 5 %: not worth it
            timing(small, 64, 0.5, 1.0),
            timing(small, 256, 1.1, 1.0),  # a larger one is slower: never
        ]
    )
    assert gate.least_rows == {large: 64}
    assert gate.pays(*large, 64) and gate.pays(*large, 1000)
    assert not gate.pays(*large, 63) and not gate.pays(*small, 64) and not gate.pays(128, 64, 900)


def test_a_compressed_weight_is_used_from_the_gate_on(monkeypatch):
    """Which of the two is multiplied, with a stand-in for the compressed one."""
    from prunery.kernels.sparse24 import Sparse24

    dense = pruned(4, 8)
    made = Sparse24(dense, -dense, Gate24({(4, 8): 3}))
    x = torch.randn(3, 8)
    assert torch.equal(sparse24_linear(x, made), x @ -dense.T)
    assert torch.equal(sparse24_linear(x[:2], made), x[:2] @ dense.T)
