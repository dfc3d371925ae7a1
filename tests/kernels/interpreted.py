"""The Triton kernels in Triton's interpreter: run by test_triton.py with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter's product of bfloat16 is wrong.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.kernels import (
    attention_mass,
    attention_triton,
    centers_triton,
    k_center_step,
    nearest_triton,
    pairwise_topk,
    token_stats,
    tokens_triton,
)
from prunery.kernels.tokens_triton import Tiles

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
from .test_attention import questions

NAMES = ("nll", "entropy", "lse")
DTYPES = (torch.float32, torch.float16)


def test_this_is_the_interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def small_tiles():
    """Few rows and entries make many tiles, several groups and several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_triton, "pick_tiles", lambda states: Tiles(16, 16, 16, 4, 3))
        patch.setattr(tokens_triton, "GROUP", 2)
        patch.setattr(tokens_triton, "PROGRAMS", 6)
        patch.setattr(attention_triton, "tile_sizes", lambda inner, size: (16, 16))
        for name in ("ROWS", "INNER", "BLOCKS"):
            patch.setattr(centers_triton, name, 4)
        patch.setattr(nearest_triton, "tile_sizes", lambda size: (16, 16, 16))
        patch.setattr(nearest_triton, "BLOCK", (20, 20 * 37))
        yield


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70),
    size=st.integers(1, 40),
    vocabulary=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    ban=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([1.0, 0.37]),
    rank=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_tokens(rows, size, vocabulary, dtype, weight_dtype, bias, ban, softcap, scale, rank, seed):
    banned = vocabulary // 2 if ban else 0
    hidden, weight, targets, shift = tokens(seed, rows, size, vocabulary, bias=bias, ban=banned)
    hidden, weight = hidden.to(dtype), weight.to(weight_dtype)
    truth = stats_of(logits_of(hidden, weight, shift, softcap, scale), targets)
    plain = stats_of(logits_of(hidden, weight, shift, softcap, scale, torch.float32), targets)
    options = {"bias": shift, "softcap": softcap, "scale": scale, "rank": rank, "impl": "triton"}
    made = token_stats(hidden, weight, targets, **options)
    for name, want, near in zip(NAMES, truth, plain, strict=False):
        assert distance(getattr(made, name), want) <= distance(near, want) + 5e-6
    again = token_stats(hidden, weight, targets, **options)
    assert all(torch.equal(getattr(made, name), getattr(again, name)) for name in NAMES)
    if rank:
        assert (made.rank - truth[3]).abs().max() <= 1


def test_rank_with_ties():
    made = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (40, 4), generator=made).float()
    weight = torch.randint(-2, 3, (80, 4), generator=made).float()
    targets = torch.randint(80, (40,), generator=made)
    logits = hidden @ weight.T
    want = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert torch.equal(token_stats(hidden, weight, targets, rank=True, impl="triton").rank, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_no_other(bad):
    hidden, weight, targets, _ = tokens(4, 40, 6, 70)
    hidden, weight = hidden.abs() + 0.1, weight.abs() + 0.1
    clean = token_stats(hidden, weight, targets, impl="triton")
    hidden[7, 2] = bad
    made = token_stats(hidden, weight, targets, impl="triton")
    others = torch.arange(40) != 7
    for name in NAMES:
        assert torch.isnan(getattr(made, name)[7])
        assert torch.equal(getattr(made, name)[others], getattr(clean, name)[others])


def test_banned_target_ignored_rows_and_strides():
    hidden, weight, targets, bias = tokens(5, 35, 9, 60, ban=33)
    targets[3], targets[5:20] = 2, -100
    want = token_stats(hidden, weight, targets, bias=bias, rank=True, impl="reference")
    apart = torch.stack([hidden, hidden.neg()], 2)[..., 0]
    turned = weight.T.contiguous().T
    made = token_stats(apart, turned, targets, bias=bias, rank=True, impl="triton")
    assert made.nll[3] == math.inf and not made.nll[5:20].any()
    for name in NAMES:
        assert distance(getattr(made, name), getattr(want, name)) < 5e-6
    assert torch.equal(made.rank, want.rank)


def test_all_ignored():
    made = token_stats(
        torch.randn(3, 4), torch.randn(5, 4), torch.full((3,), -100), rank=True, impl="triton"
    )
    assert not made.nll.any() and not made.rank.any() and made.rank.shape == (3,)


@settings(max_examples=12, deadline=None)
@given(question=questions(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
def test_attention(question, dtype, seed):
    shape, options, sides = question
    query, key = heads(seed, *shape, dtype)
    truth = mass_of(attention_of(query, key, **options), **sides)
    plain = mass_of(attention_of(query, key, **options, dtype=torch.float32), **sides)
    made = attention_mass(query, key, **options, **sides, impl="triton")
    assert distance(made.row, truth[0]) <= distance(plain[0], truth[0]) + 2e-6
    assert distance(made.column, truth[1]) <= distance(plain[1], truth[1]) + 5e-6


@pytest.mark.parametrize(("window", "programs"), [(None, 1), (30, 64), (None, 64)])
def test_attention_over_many_tiles_and_parts(window, programs, monkeypatch):
    monkeypatch.setattr(attention_triton, "PROGRAMS", programs)
    # 118 - 37 is one more than a multiple of 16: a block's last query sees one key of a new tile.
    query, key = heads(6, 1, 2, 1, 37, 118, 20)
    prompt = torch.arange(118)[None] < 60
    chosen = torch.arange(37)[None] > 20  # the first block of queries has none
    options = {"query_rows": chosen, "key_columns": prompt, "scale": 0.3, "window": window}
    want = attention_mass(query, key, **options, impl="reference")
    made = attention_mass(query, key, **options, impl="triton")
    again = attention_mass(query, key, **options, impl="triton")
    assert distance(made.row, want.row) < 2e-6 and distance(made.column, want.column) < 5e-6
    assert torch.equal(made.row, again.row) and torch.equal(made.column, again.column)


def test_attention_keeps_unseen_nan_out():
    query, key = heads(5, 1, 2, 2, 8, 8, 4)
    segment = torch.tensor([[0] * 6 + [-1] * 2])
    chosen = torch.tensor([[False, True, True, True, True, True, False, False]])
    options = {"scale": 0.5, "query_segment": segment, "key_segment": segment}
    want = attention_mass(query, key, **options, query_rows=chosen, impl="triton")
    key[:, :, 6:], query[:, :, 0] = math.nan, math.nan
    made = attention_mass(query, key, **options, query_rows=chosen, impl="triton")
    assert torch.equal(made.row, want.row) and torch.equal(made.column, want.column)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4, 5), (2, 2, 1, 0, 4, 5), (2, 2, 1, 3, 0, 5)])
def test_attention_of_nothing(shape):
    query, key = heads(7, *shape)
    made = attention_mass(query, key, scale=1.0, impl="triton")
    assert not made.row.any() and not made.column.any()
    assert attention_mass(query, key, scale=1.0, columns=False, impl="triton").column is None


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 80),
    size=st.integers(1, 30),
    dtype=st.sampled_from((*DTYPES, torch.bfloat16)),
    centre_dtype=st.sampled_from(DTYPES),
    track=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_centers(rows, size, dtype, centre_dtype, track, seed):
    points, centre, away = cluster_rows(seed, rows, size)
    points, centre = points.to(dtype), centre.to(centre_dtype)
    truth, plain = (step_of(points, centre, away, kind) for kind in (torch.float64, torch.float32))
    known = away.clone()
    nearest = torch.full((rows,), -5) if track else None
    made = k_center_step(points, centre, away, nearest=nearest, number=9, impl="triton")
    assert distance(away, truth) <= distance(plain, truth) + 1e-6
    assert made.distance == away.max()
    assert made.index == (away.argmax() if away.max() >= 0 else -1)
    if track:
        assert torch.equal(nearest == 9, away < known)
        assert set(nearest.tolist()) <= {9, -5}


def test_centers_ties_chosen_strides_and_nothing():
    points = torch.eye(5).repeat(9, 1)
    away = torch.full((45,), 3.0)
    away[[1, 2]] = -1.0
    turned, apart = points.T.contiguous().T, torch.stack([points[0]] * 2, 1)[:, 0]
    made = k_center_step(turned, apart, away, impl="triton")
    assert (made.distance.item(), made.index.item()) == (1.0, 3)
    assert away[:6].tolist() == [0.0, -1.0, -1.0, 1.0, 1.0, 0.0]
    points[3] = math.nan
    made = k_center_step(points, points[4], away, impl="triton")
    assert (made.distance.item(), made.index.item(), away[3].item()) == (1.0, 3, 1.0)
    for rows in (0, 7):
        away = torch.full((rows,), -1.0)
        made = k_center_step(points[:rows], points[0], away, impl="triton")
        assert (made.distance.item(), made.index.item()) == (-1.0, -1)


@settings(max_examples=12, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 50), st.integers(1, 90)),
    size=st.integers(1, 40),
    k=st.integers(1, 100),
    metric=st.sampled_from(("ip", "l2")),
    dtype=st.sampled_from(DTYPES),
    point_dtype=st.sampled_from(DTYPES),
    exclude=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_nearest(counts, size, k, metric, dtype, point_dtype, exclude, seed):
    queries, points, out = sides(seed, *counts, size, exclude=exclude)
    queries, points = queries.to(dtype), points.to(point_dtype)
    made = pairwise_topk(queries, points, k, metric=metric, exclude=out, impl="triton")
    check_topk(made, queries, points, k, metric, out)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nearest_ties_strides_and_nan(metric):
    made = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (30, 3), generator=made).float()
    points = torch.randint(-1, 2, (100, 3), generator=made).float()
    want, place = top_of(queries, points, 40, metric, None)
    turned, apart = points.T.contiguous().T, torch.stack([queries, -queries], 2)[..., 0]
    values, indices = pairwise_topk(apart, turned, 40, metric=metric, impl="triton")
    assert torch.equal(values.double(), want) and torch.equal(indices, place)
    assert not torch.signbit(values[values == 0.0]).any()
    points[17] = math.nan
    indices = pairwise_topk(queries, points, 100, metric=metric, impl="triton")[1]
    assert (indices[:, -1] == -1).all() and not (indices == 17).any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_nearest_of_nothing(shape):
    rows, count, size = shape
    given = torch.zeros(rows, size), torch.zeros(count, size)
    want = pairwise_topk(*given, 2, metric="l2", impl="reference")
    made = pairwise_topk(*given, 2, metric="l2", impl="triton")
    assert all(torch.equal(one, other) for one, other in zip(made, want, strict=True))
