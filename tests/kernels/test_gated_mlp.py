"""sparse_gated_mlp: worked by hand, against the words, dense beyond the gate, NaN, refusals."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import gated_mlp_torch, sparse_gated_mlp

from .cases import distance
from .weight_cases import mlp, mlp_of

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """relu(gate x) is 1, 2, 0 and 3; up x is 4, -1, 5 and 0.5: products 4, -2, 0 and 1.5."""
    x = torch.tensor([[1.0, 1.0]])
    gate = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [1.0, 2.0]])
    up = torch.tensor([[4.0, 0.0], [0.0, -1.0], [5.0, 0.0], [0.5, 0.0]])
    down_t = torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 7.0], [0.0, 1.0]])

    def made(threshold, rule="gate"):
        options = {"activation": "relu", "rule": rule, "impl": impl}
        return sparse_gated_mlp(x, gate, up, down_t, threshold, **options).tolist()

    assert made(0.0) == [[-16.0, 1.5]]
    assert made(1.0) == [[-20.0, 1.5]]  # a value equal to the threshold is dead
    assert made(torch.tensor([0.5, 2.5, 0.0, 3.5])) == [[4.0, 0.0]]
    assert made(1.5, "product") == [[-16.0, 0.0]]
    assert made(math.inf) == [[0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    rule=st.sampled_from(["gate", "product"]),
    level=st.floats(0.05, 1.5),
    seed=st.integers(0, 2**20),
)
def test_torch_is_the_masked_product(rows, sizes, dtype, activation, rule, level, seed):
    given_ = mlp(seed, rows, *sizes, dtype)
    limit = torch.rand(sizes[1], generator=torch.Generator().manual_seed(seed)) * level
    want, nearest = mlp_of(*given_, limit, activation, rule)
    eps = torch.finfo(dtype).eps
    assume(nearest > 30 * eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_mlp_torch, "BYTES", 64)
        made = sparse_gated_mlp(*given_, limit, activation=activation, rule=rule)
    plain = sparse_gated_mlp(*given_, limit, activation=activation, rule=rule, impl="reference")
    assert made.dtype == plain.dtype == dtype
    # What is rounded: gate x, up x, h and the result.
    assert distance(made, want) <= 60 * eps
    assert distance(plain, want) <= 8 * eps


def test_dead_rows_are_not_read_until_too_many_live(monkeypatch):
    x, gate, up, down_t = mlp(3, 1, 12, 10, 9)
    alive = torch.nn.functional.silu(gate @ x[0]).abs() > 0.1
    want, _ = mlp_of(x, gate, up, down_t, 0.1)
    assert alive.any() and not alive.all()
    up[~alive], down_t[~alive] = math.nan, math.nan
    share = float(alive.float().mean())
    monkeypatch.setattr(gated_mlp_torch, "DENSE_SHARE_FLOAT", share + 0.01)
    assert distance(sparse_gated_mlp(x, gate, up, down_t, 0.1), want) < 1e-5
    monkeypatch.setattr(gated_mlp_torch, "DENSE_SHARE_FLOAT", share - 0.1)
    assert sparse_gated_mlp(x, gate, up, down_t, 0.1).isnan().any()
    monkeypatch.undo()
    many = x.expand(5, 12)  # more rows than are decoded at once: dense as well
    assert sparse_gated_mlp(many, gate, up, down_t, 0.1).isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", ["gate", "product"])
def test_nan_is_seen(rule, impl):
    x, gate, up, down_t = mlp(4, 2, 5, 8, 6)
    x[1, 2] = math.nan
    made = sparse_gated_mlp(x, gate, up, down_t, 0.2, rule=rule, impl=impl)
    assert made[1].isnan().all() and not made[0].isnan().any()


def test_strides_gradients_autocast_and_nothing():
    x, gate, up, down_t = mlp(5, 3, 8, 12, 6)
    want = sparse_gated_mlp(x, gate, up, down_t, 0.3)
    turned = [one.T.contiguous().T.requires_grad_() for one in (x, gate, up, down_t)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = sparse_gated_mlp(*turned, 0.3)
    assert distance(made, want) < 1e-6 and not made.requires_grad
    assert sparse_gated_mlp(x[:0], gate, up, down_t, 0.3).shape == (0, 6)
    assert not sparse_gated_mlp(x, gate[:0], up[:0], down_t[:0], 0.3).any()


X, GATE, DOWN = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((X, GATE, GATE[:2], DOWN, 0.1), {}, r"\(2, 3\), \(4, 3\), \(2, 3\), \(4, 5\)"),
        ((X, GATE, GATE, DOWN.T, 0.1), {}, "Is down transposed"),
        ((X, GATE, GATE.double(), DOWN, 0.1), {}, "up is torch.float32 .* torch.float64"),
        ((X.int(), GATE, GATE, DOWN, 0.1), {}, "x is of a floating dtype"),
        ((X, GATE, GATE, DOWN, -0.1), {}, "at least 0; found -0.1"),
        ((X, GATE, GATE, DOWN, math.nan), {}, "at least 0; found nan"),
        ((X, GATE, GATE, DOWN, torch.ones(3)), {}, r"number or \(4,\) .* found \(3,\)"),
        (
            (X, GATE, GATE, DOWN, torch.tensor([0.0, 1.0, -2.0, 0.0])),
            {},
            "found -2.0 at neuron 2",
        ),
        ((X, GATE, GATE, DOWN, 0.1), {"activation": "tanh"}, "silu, gelu, .* found 'tanh'"),
        ((X, GATE, GATE, DOWN, 0.1), {"rule": "up"}, "gate or product; found 'up'"),
    ],
)
def test_refusals_say_what_was_found(arguments, options, words):
    with pytest.raises(InputError, match=words):
        sparse_gated_mlp(*arguments, **options)
