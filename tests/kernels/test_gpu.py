"""The kernels on a real GPU: numbers, determinism, memory. Skipped where there is none."""

import pytest
import torch

from prunery.kernels import attention_mass, token_stats

from .cases import attention_of, distance, heads, logits_of, mass_of, stats_of, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ("nll", "entropy", "lse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moved(*tensors):
    return [one if one is None else one.cuda() for one in tensors]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"), [(1, 8, 7), (300, 96, 5003), (77, 200, 900)]
)
def test_tokens(rows, size, vocabulary, dtype, impl):
    hidden, weight, targets, bias = tokens(1, rows, size, vocabulary, dtype, bias=True, ban=3)
    options = {"softcap": 20.0, "scale": 0.8}
    truth = stats_of(logits_of(hidden, weight, bias, **options), targets)
    plain = stats_of(logits_of(hidden, weight, bias, **options, dtype=torch.float32), targets)
    hidden, weight, targets, bias = moved(hidden, weight, targets, bias)
    one, two = (
        token_stats(hidden, weight, targets, bias=bias, **options, rank=True, impl=impl)
        for _ in range(2)
    )
    for name, want, near in zip(NAMES, truth, plain, strict=False):
        made = getattr(one, name)
        assert distance(made.cpu(), want) <= distance(near, want) + 2e-5
        assert torch.equal(made, getattr(two, name))
    assert (one.rank.cpu() - truth[3]).abs().max() <= 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False, "softcap": 5.0}, {"window": 9}])
def test_attention(options, dtype, impl):
    query, key = heads(2, 2, 6, 2, 37, 90, 24, dtype)
    sides = {"query_rows": torch.rand(2, 37) > 0.3, "key_columns": torch.rand(2, 90) > 0.5}
    truth = mass_of(attention_of(query, key, scale=0.3, **options), **sides)
    sides = {name: one.cuda() for name, one in sides.items()}
    one, two = (
        attention_mass(query.cuda(), key.cuda(), scale=0.3, **options, **sides, impl=impl)
        for _ in range(2)
    )
    assert distance(one.row.cpu(), truth[0]) < 1e-5
    assert distance(one.column.cpu(), truth[1]) < 5e-5
    assert torch.equal(one.row, two.row) and torch.equal(one.column, two.column)


def test_extra_memory_stays_under_64_mb():
    hidden = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(131072, 256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(131072, (8192,), device="cuda")
    token_stats(hidden, weight, targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_stats(hidden, weight, targets, rank=True)
    assert torch.cuda.max_memory_allocated() - before < 64e6


def test_a_target_outside_is_refused():
    from prunery.errors import InputError

    with pytest.raises(InputError, match="found 7 at place 0"):
        token_stats(
            torch.zeros(1, 4, device="cuda"),
            torch.zeros(7, 4, device="cuda"),
            torch.tensor([7], device="cuda"),
        )
