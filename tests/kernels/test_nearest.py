"""pairwise_topk: the reference against the words, torch against the truth, borders, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import nearest_torch, pairwise_topk

from .cases import check_topk, sides, top_of

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("ip", "l2")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a few rows make many of them."""
    monkeypatch.setattr(nearest_torch, "CPU_BLOCK", (3, 3 * 9))


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    queries = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    points = torch.tensor([[2.0, 1.0], [0.0, 1.0], [2.0, -1.0], [3.0, 0.0]])
    values, indices = pairwise_topk(queries, points, 3, impl=impl)
    assert values.tolist() == [[3.0, 2.0, 2.0], [2.0, 0.0, -2.0]]
    assert indices.tolist() == [[3, 0, 2], [2, 3, 0]]
    values, indices = pairwise_topk(queries, points, 3, metric="l2", impl=impl)
    # (1, 0): 2, 2, 2, 4; (0, -2): 13, 9, 5, 13.
    assert values.tolist() == [[2.0, 2.0, 2.0], [5.0, 9.0, 13.0]]
    assert indices.tolist() == [[0, 1, 2], [2, 1, 0]]
    assert values.dtype == torch.float32 and indices.dtype == torch.int64


@settings(max_examples=80, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 14), st.integers(1, 60)),
    size=st.integers(1, 40),
    k=st.integers(1, 70),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
    point_dtype=st.sampled_from(DTYPES),
    exclude=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_torch_is_as_near_to_the_truth_as_plain(
    counts, size, k, metric, dtype, point_dtype, exclude, seed
):
    queries, points, out = sides(seed, *counts, size, exclude=exclude)
    queries, points = queries.to(dtype), points.to(point_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_torch, "CPU_BLOCK", (5, 5 * 11))
        made = pairwise_topk(queries, points, k, metric=metric, exclude=out)
    check_topk(made, queries, points, k, metric, out)
    truth = pairwise_topk(queries, points, k, metric=metric, exclude=out, impl="reference")
    check_topk(truth, queries, points, k, metric, out, slack=0.0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 256])
def test_the_usual_blocks(metric, k):
    queries, points, out = sides(1, 515, 8300, 12, exclude=True)
    made = pairwise_topk(queries, points, k, metric=metric, exclude=out)
    check_topk(made, queries, points, k, metric, out)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 4, 9, 30, 80])
@pytest.mark.usefixtures("small_blocks")
def test_ties_go_to_the_smaller_index(metric, impl, k):
    """Small whole numbers have exact products and many equal ones, 0 and -0 among them."""
    made = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (20, 3), generator=made).float()
    points = torch.randint(-1, 2, (70, 3), generator=made).float()
    values, indices = pairwise_topk(queries, points, k, metric=metric, impl=impl)
    want, place = top_of(queries, points, k, metric, None)
    assert torch.equal(values.double(), want)
    assert torch.equal(indices, place)
    assert not torch.signbit(values[values == 0.0]).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_zero_is_zero(impl):
    values, indices = pairwise_topk(
        -torch.ones(2, 1), torch.tensor([[0.0], [-0.0], [1.0], [0.0]]), 3, impl=impl
    )
    assert indices.tolist() == [[0, 1, 3]] * 2
    assert not torch.signbit(values).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("small_blocks")
def test_too_few_points(impl, metric):
    queries, points, _ = sides(2, 4, 12, 5)
    out = torch.tensor([0, 11, -1, 5])
    values, indices = pairwise_topk(queries, points, 14, metric=metric, exclude=out, impl=impl)
    bad = math.inf if metric == "l2" else -math.inf
    assert (indices == -1).sum(1).tolist() == [3, 3, 2, 3]
    assert torch.equal(indices == -1, values == bad)
    for row, left in enumerate(out.tolist()):
        assert set(indices[row].tolist()) == set(range(12)) - {left} | {-1}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("metric", METRICS)
def test_empty(impl, shape, metric):
    rows, count, size = shape
    queries, points = torch.zeros(rows, size), torch.zeros(count, size)
    values, indices = pairwise_topk(queries, points, 2, metric=metric, impl=impl)
    assert values.shape == indices.shape == (rows, 2)
    if count:
        assert (values == 0.0).all() and (indices == torch.arange(2)).all()
    else:
        assert torch.isinf(values).all() and (indices == -1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("small_blocks")
def test_nan_is_never_chosen(impl, metric):
    queries, points, _ = sides(3, 6, 40, 4)
    clean = pairwise_topk(queries, points, 40, metric=metric, impl=impl)
    points[17] = math.nan
    indices = pairwise_topk(queries, points, 40, metric=metric, impl=impl)[1]
    assert (indices[:, -1] == -1).all() and not (indices == 17).any()
    assert torch.equal(indices[:, :-1], clean[1][clean[1] != 17].reshape(6, 39))
    queries[2] = math.nan
    indices = pairwise_topk(queries, points, 3, metric=metric, impl=impl)[1]
    assert (indices[2] == -1).all() and (indices[[0, 1, 3]] >= 0).all()


def test_a_point_is_at_0_from_itself():
    """Rounding must not make a squared distance negative."""
    points = torch.nn.functional.normalize(torch.randn(300, 48), dim=1)
    values, indices = pairwise_topk(points, points, 1, metric="l2")
    assert (values >= 0.0).all() and (values < 1e-6).all()
    assert torch.equal(indices[:, 0], torch.arange(300))


def test_exclude_leaves_oneself_out():
    points = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    found = pairwise_topk(points, points, 3, exclude=torch.arange(50))[1]
    assert not (found == torch.arange(50)[:, None]).any()
    assert torch.equal(found, pairwise_topk(points, points, 4)[1][:, 1:])


def test_strides_gradients_and_autocast():
    queries, points, _ = sides(4, 20, 80, 16)
    want = pairwise_topk(queries, points, 5)
    turned = points.T.contiguous().T.requires_grad_()
    apart = torch.stack([queries, -queries], 2)[..., 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = pairwise_topk(apart, turned, 5)
    torch.testing.assert_close(made[0], want[0], rtol=0, atol=1e-5)
    assert torch.equal(made[1], want[1])
    assert not made[0].requires_grad


def test_keys_sort_as_values_then_indices():
    values = torch.tensor([0.0, 1.5, -1.5, math.inf, -math.inf, 1e-40, -3e38, 1.5])
    place = torch.arange(8)
    order = nearest_torch.keys_of(values, place).argsort(descending=True)
    assert order.tolist() == [3, 1, 7, 5, 0, 2, 6, 4]
    back = nearest_torch.of_keys(nearest_torch.keys_of(values, place))
    assert torch.equal(back[0], values) and torch.equal(back[1], place)


Q, P = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Q, P[:, :2], 1), {}, r"\(2, 3\) and \(4, 2\)"),
        ((Q.int(), P, 1), {}, "queries is of a floating dtype"),
        ((Q, P.int(), 1), {}, "points is of a floating dtype"),
        ((Q, P.to("meta"), 1), {}, "one device; found cpu and meta"),
        ((Q, P, 0), {}, "k is at least 1; found 0"),
        ((Q, P, 1), {"metric": "cosine"}, "'ip' or 'l2'; found 'cosine'"),
        ((Q, P, 1), {"exclude": torch.zeros(3).long()}, r"exclude is \(2,\).*found \(3,\)"),
        ((Q, P, 1), {"exclude": torch.zeros(2).int()}, "int64 on cpu; found .* torch.int32"),
        ((Q, P, 1), {"impl": "cuda"}, "impl is one of .*'cuda'"),
    ],
)
def test_refusals_say_what_was_found(arguments, options, words):
    with pytest.raises(InputError, match=words):
        pairwise_topk(*arguments, **options)
