"""attention_mass: against the matrix built pair by pair, sights, borders and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import attention_mass, attention_torch

from .cases import attention_of, distance, heads, mass_of

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """Query 0 stands at position 1: weights (1, 3) / 4; query 1 sees three: (1, 3, 1) / 5."""
    query = torch.ones(1, 1, 2, 1)
    key = torch.tensor([0.0, math.log(3), 0.0]).reshape(1, 1, 3, 1)
    prompt = torch.tensor([[True, False, True]])
    made = attention_mass(query, key, key_columns=prompt, scale=1.0, impl=impl)
    assert made.row[0, 0].tolist() == pytest.approx([1 / 4, 2 / 5], abs=1e-6)
    want = [1 / 4 + 1 / 5, 3 / 4 + 3 / 5, 1 / 5]
    assert made.column[0, 0].tolist() == pytest.approx(want, abs=1e-6)
    near = attention_mass(query, key, key_columns=prompt, window=1, scale=1.0, impl=impl)
    assert near.row[0, 0].tolist() == [0.0, 1.0]
    assert near.column[0, 0].tolist() == [0.0, 1.0, 1.0]


@st.composite
def questions(draw):
    """Shapes and options of a call, padded or packed or neither."""
    shared, key_heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    batch, queries, keys = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 19)),
        draw(st.integers(1, 23)),
    )
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    options = {
        "scale": draw(st.sampled_from([0.25, 1.3])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 4, 50])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    if draw(st.booleans()):
        packed = torch.randint(-1, 3, (batch, keys + queries), generator=made)
        if draw(st.booleans()):
            packed = packed.sort(1).values  # documents in a row, padding on the left
        options |= {"query_segment": packed[:, -queries:], "key_segment": packed[:, -keys:]}
    sides = {}
    if draw(st.booleans()):
        sides["query_rows"] = torch.rand(batch, queries, generator=made) > 0.5
    if draw(st.booleans()):
        sides["key_columns"] = torch.rand(batch, keys, generator=made) > 0.5
    shape = (batch, shared * key_heads, key_heads, queries, keys, draw(st.integers(1, 17)))
    return shape, options, sides


@settings(max_examples=60, deadline=None)
@given(question=questions(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
def test_as_near_to_the_truth_as_plain(question, dtype, seed):
    shape, options, sides = question
    query, key = heads(seed, *shape, dtype)
    truth = mass_of(attention_of(query, key, **options), **sides)
    plain = mass_of(attention_of(query, key, **options, dtype=torch.float32), **sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_torch, "CPU_BLOCK", (4, 60))
        found = {impl: attention_mass(query, key, **options, **sides, impl=impl) for impl in IMPLS}
    assert distance(found["reference"].row, truth[0]) < 1e-6
    assert distance(found["reference"].column, truth[1]) < 2e-6
    assert distance(found["torch"].row, truth[0]) <= distance(plain[0], truth[0]) + 2e-6
    assert distance(found["torch"].column, truth[1]) <= distance(plain[1], truth[1]) + 5e-6


def test_blocks_as_they_are_in_use():
    query, key = heads(1, 1, 4, 2, 300, 411, 8)
    prompt = torch.arange(411)[None] < 100
    truth = attention_mass(query, key, key_columns=prompt, scale=0.3, impl="reference")
    made = attention_mass(query, key, key_columns=prompt, scale=0.3)
    assert distance(made.row, truth.row) < 1e-6
    assert distance(made.column, truth.column) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_share_one_and_columns_add_up(impl):
    """All keys chosen: a row's mass is 1 exactly; the columns' sum is the number of queries."""
    query, key = heads(2, 2, 4, 2, 9, 13, 6)
    made = attention_mass(query, key, scale=0.4, impl=impl)
    torch.testing.assert_close(made.row, torch.ones(2, 4, 9))
    torch.testing.assert_close(made.column.sum(2), torch.full((2, 4), 9.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_documents_are_as_they_are_alone(impl):
    query, key = heads(3, 1, 2, 1, 15, 15, 6)
    segment = torch.tensor([[0] * 6 + [1] * 7 + [-1] * 2])
    made = attention_mass(
        query, key, scale=0.4, query_segment=segment, key_segment=segment, impl=impl
    )
    for part in (slice(0, 6), slice(6, 13)):
        alone = attention_mass(query[:, :, part], key[:, :, part], scale=0.4, impl=impl)
        assert distance(made.row[..., part], alone.row) < 1e-6
        assert distance(made.column[..., part], alone.column) < 1e-6
    assert not made.row[..., 13:].any() and not made.column[..., 13:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_read_their_own_group(impl):
    """Grouped heads equal heads whose keys were repeated one by one."""
    query, key = heads(4, 2, 6, 2, 7, 9, 5)
    prompt = torch.arange(9)[None].repeat(2, 1) < 4
    made = attention_mass(query, key, key_columns=prompt, scale=0.5, impl=impl)
    whole = key.repeat_interleave(3, 1)
    want = attention_mass(query, whole, key_columns=prompt, scale=0.5, impl=impl)
    assert distance(made.row, want.row) < 1e-6 and distance(made.column, want.column) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_seen_may_be_nan(impl):
    """Padding keys may hold anything; so may queries that were not asked for."""
    query, key = heads(5, 1, 2, 2, 8, 8, 4)
    segment = torch.tensor([[0] * 6 + [-1] * 2])
    chosen = torch.tensor([[False, True, True, True, True, True, False, False]])
    options = {"scale": 0.5, "query_segment": segment, "key_segment": segment}
    want = attention_mass(query, key, **options, query_rows=chosen, impl=impl)
    key[:, :, 6:], query[:, :, 0] = math.nan, math.nan
    made = attention_mass(query, key, **options, query_rows=chosen, impl=impl)
    assert torch.equal(made.row, want.row) and torch.equal(made.column, want.column)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_query_spoils_its_own_row(impl):
    query, key = heads(6, 1, 2, 1, 8, 8, 4)
    clean = attention_mass(query, key, scale=0.5, impl=impl)
    query[0, 1, 3] = math.nan
    made = attention_mass(query, key, scale=0.5, impl=impl)
    assert torch.isnan(made.row[0, 1, 3]) and torch.isnan(made.column[0, 1, :4]).all()
    others = torch.arange(8) != 3
    torch.testing.assert_close(made.row[..., others], clean.row[..., others])
    torch.testing.assert_close(made.column[0, 0], clean.column[0, 0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4, 5), (2, 2, 1, 0, 4, 5), (2, 2, 1, 3, 0, 5)])
def test_empty(impl, shape):
    query, key = heads(7, *shape)
    made = attention_mass(query, key, scale=1.0, impl=impl)
    assert made.row.shape == query.shape[:3] and made.column.shape == (*query.shape[:2], shape[4])
    assert not made.row.any() and not made.column.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_more_queries_than_keys(impl):
    """The first queries stand before every key."""
    query, key = heads(8, 1, 1, 1, 5, 3, 4)
    made = attention_mass(query, key, scale=1.0, impl=impl)
    assert made.row[0, 0, :2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(made.row[0, 0, 2:], torch.ones(3))


@pytest.mark.parametrize("impl", IMPLS)
def test_columns_can_be_left_out(impl):
    query, key = heads(9, 2, 4, 2, 5, 7, 4)
    made = attention_mass(query, key, scale=0.5, columns=False, impl=impl)
    assert made.column is None
    assert torch.equal(made.row, attention_mass(query, key, scale=0.5, impl=impl).row)


def test_same_bits_twice_and_strides():
    query, key = heads(10, 2, 4, 2, 70, 91, 8)
    one, two = (attention_mass(query, key, scale=0.5, window=20) for _ in range(2))
    assert torch.equal(one.row, two.row) and torch.equal(one.column, two.column)
    # As a model has them: (B, S, H, D) seen as (B, H, S, D).
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    made = attention_mass(query, key, scale=0.5, window=20)
    assert distance(made.row, one.row) < 1e-6 and distance(made.column, one.column) < 1e-5


def test_autocast_does_not_reach_in():
    query, key = heads(11, 1, 2, 1, 9, 9, 8)
    prompt = torch.arange(9)[None] < 4
    want = attention_mass(query, key, key_columns=prompt, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = attention_mass(query, key, key_columns=prompt, scale=1.0)
    assert torch.equal(made.row, want.row) and torch.equal(made.column, want.column)


QUERY, KEY = torch.zeros(2, 4, 3, 5), torch.zeros(2, 2, 6, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((QUERY, KEY[:1]), {}, r"found \(2, 4, 3, 5\) and \(1, 2, 6, 5\)"),
        ((QUERY[:, :3], KEY), {}, "Hk a divisor of H"),
        ((QUERY[..., :2], KEY), {}, "Hk a divisor of H"),
        ((QUERY[0], KEY), {}, r"query is \(B, H, Q, D\)"),
        ((QUERY.long(), KEY), {}, "query is of a floating dtype"),
        ((QUERY, KEY), {"scale": 0.0}, "scale is .* above 0"),
        ((QUERY, KEY), {"softcap": -1.0}, "softcap is .* above 0"),
        ((QUERY, KEY), {"window": 0}, "window is at least 1"),
        ((QUERY, KEY), {"query_rows": torch.ones(2, 6).bool()}, r"query_rows is \(2, 3\) bool"),
        ((QUERY, KEY), {"key_columns": torch.ones(2, 6)}, r"key_columns is \(2, 6\) bool"),
        ((QUERY, KEY), {"key_segment": torch.ones(2, 6).int()}, "given together"),
        (
            (QUERY, KEY),
            {"query_segment": torch.ones(2, 3), "key_segment": torch.ones(2, 6).int()},
            "query_segment is .* int32 or int64",
        ),
        ((QUERY, KEY.to("meta")), {}, "one device; found cpu and meta"),
        ((QUERY, KEY), {"impl": "flash"}, "impl is one of"),
    ],
)
def test_refusals_say_what_was_found(arguments, options, words):
    with pytest.raises(InputError, match=words):
        attention_mass(*arguments, **{"scale": 1.0, **options})
