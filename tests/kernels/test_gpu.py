"""The kernels on a real GPU: numbers, determinism, memory. Skipped where there is none."""

import pytest
import torch

from prunery.kernels import attention_mass, k_center_step, pairwise_topk, token_stats
from prunery.pruners.sample.farthest import farthest_first

from .cases import (
    attention_of,
    check_topk,
    cluster_rows,
    distance,
    heads,
    logits_of,
    mass_of,
    sides,
    stats_of,
    step_of,
    tokens,
    top_of,
)

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


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 3), (1000, 384), (70001, 40)])
def test_centers(rows, size, dtype, impl):
    points, centre, known = cluster_rows(3, rows, size)
    points, centre = points.to(dtype), centre.to(dtype)
    truth, plain = (step_of(points, centre, known, kind) for kind in (torch.float64, torch.float32))
    made = []
    for _ in range(2):
        away, nearest = known.cuda(), torch.zeros(rows, dtype=torch.int64, device="cuda")
        step = k_center_step(
            points.cuda(), centre.cuda(), away, nearest=nearest, number=9, impl=impl
        )
        made.append((away, nearest, step.distance, step.index))
    away, nearest, furthest, index = made[0]
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert distance(away.cpu(), truth) <= distance(plain, truth) + 1e-6
    assert furthest == away.max()
    assert index == ((away == away.max()).nonzero()[0, 0] if away.max() >= 0 else -1)
    assert torch.equal(nearest.cpu() == 9, away.cpu() < known)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "size", "k"), [((3, 9), 5, 12), ((300, 20011), 96, 256)])
def test_nearest(counts, size, k, dtype, metric, impl):
    queries, points, out = sides(5, *counts, size, exclude=True)
    queries, points = queries.to(dtype), points.to(dtype)
    given = moved(queries, points, out)
    one, two = (
        pairwise_topk(*given[:2], k, metric=metric, exclude=given[2], impl=impl) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    check_topk([made.cpu() for made in one], queries, points, k, metric, out)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_ties_and_one_query(metric, impl):
    made = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (40, 4), generator=made).float()
    points = torch.randint(-1, 2, (3000, 4), generator=made).float()
    want, place = top_of(queries, points, 100, metric, None)
    values, indices = pairwise_topk(queries.cuda(), points.cuda(), 100, metric=metric, impl=impl)
    assert torch.equal(values.cpu().double(), want) and torch.equal(indices.cpu(), place)
    # More points than a grid's second axis has blocks of 64.
    points = torch.randn(5_000_000, 2, device="cuda")
    found = pairwise_topk(points[-1:], points, 1, metric="l2", impl=impl)[1]
    assert found.item() == 4_999_999


def test_farthest_first():
    rows = torch.nn.functional.normalize(torch.randn(20000, 64), dim=1).numpy()
    want = farthest_first(rows, 100)
    made = farthest_first(rows, 100, device="cuda")
    assert (made[0] == want[0]).all()
    assert abs(made[1] - want[1]).max() < 1e-6
    assert (made[2] == want[2]).mean() > 0.999


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
