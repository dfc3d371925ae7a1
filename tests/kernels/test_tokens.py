"""token_stats: the reference against the words, torch against the truth, borders and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import TokenStats, token_stats, tokens_torch

from .cases import NEVER, distance, logits_of, stats_of, tokens

IMPLS = ("reference", "torch")
NAMES = ("nll", "entropy", "lse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few rows and entries make many of them."""
    monkeypatch.setattr(tokens_torch, "CPU_TILE", (5, 5 * 7))
    monkeypatch.setattr(tokens_torch, "RANK_CELLS", 150)
    monkeypatch.setattr(tokens_torch, "UPCAST_CELLS", 64)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """Logits (0, log 3): p = (1/4, 3/4)."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    made = token_stats(torch.ones(2, 1), weight, torch.tensor([0, 1]), rank=True, impl=impl)
    entropy = math.log(4) / 4 + math.log(4 / 3) * 3 / 4
    assert made.nll.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], abs=1e-6)
    assert made.entropy.tolist() == pytest.approx([entropy, entropy], abs=1e-6)
    assert made.lse.tolist() == pytest.approx([math.log(4)] * 2, abs=1e-6)
    assert made.rank.tolist() == [1, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_bias_scale_and_softcap(impl):
    """scale * (4 + 2) = 3, then 2 * tanh(3 / 2): any other order gives another number."""
    weight, bias = torch.tensor([[4.0], [0.0]]), torch.tensor([2.0, 0.0])
    made = token_stats(
        torch.ones(1, 1), weight, torch.tensor([0]), bias=bias, scale=0.5, softcap=2.0, impl=impl
    )
    capped = 2 * math.tanh(1.5)
    assert made.nll.item() == pytest.approx(math.log1p(math.exp(-capped)), abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ban", [0, 20])
def test_reference_is_the_definition(softcap, ban):
    hidden, weight, targets, bias = tokens(1, 9, 8, 31, bias=True, ban=ban)
    made = token_stats(
        hidden, weight, targets, bias=bias, softcap=softcap, scale=0.7, rank=True, impl="reference"
    )
    want = stats_of(logits_of(hidden, weight, bias, softcap, 0.7), targets)
    for name, truth in zip(NAMES, want, strict=False):
        assert torch.equal(getattr(made, name), truth.float())
        assert getattr(made, name).dtype == torch.float32
    assert torch.equal(made.rank, want[3])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 23),
    size=st.integers(1, 40),
    vocabulary=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([1.0, 0.37]),
    rank=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_torch_is_as_near_to_the_truth_as_plain(
    rows, size, vocabulary, dtype, bias, softcap, scale, rank, seed
):
    """The plain path holds all logits, in float32 from float32 copies of the inputs."""
    hidden, weight, targets, shift = tokens(seed, rows, size, vocabulary, dtype, bias=bias)
    truth = stats_of(logits_of(hidden, weight, shift, softcap, scale), targets)
    plain = stats_of(logits_of(hidden, weight, shift, softcap, scale, torch.float32), targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_torch, "CPU_TILE", (5, 5 * 7))
        patch.setattr(tokens_torch, "RANK_CELLS", 150)
        patch.setattr(tokens_torch, "UPCAST_CELLS", 64)
        made = token_stats(
            hidden, weight, targets, bias=shift, softcap=softcap, scale=scale, rank=rank
        )
    for name, want, near in zip(NAMES, truth, plain, strict=False):
        assert distance(getattr(made, name), want) <= distance(near, want) + 5e-6
    assert (made.nll >= 0).all() and (made.entropy >= 0).all()
    assert (made.rank is not None) == rank


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary_at_the_usual_tiles(dtype):
    """Several tiles of rows and of entries as they are in use; logits of a trained model's size."""
    hidden, weight, targets, _ = tokens(2, 600, 24, 9001, dtype, spread=15.0)
    truth = stats_of(logits_of(hidden, weight), targets)
    plain = stats_of(logits_of(hidden, weight, dtype=torch.float32), targets)
    half = stats_of((hidden @ weight.T).float(), targets)
    made = token_stats(hidden, weight, targets, rank=True)
    for name, want, near, rough in zip(NAMES, truth, plain, half, strict=False):
        off = distance(getattr(made, name), want)
        assert off <= distance(near, want) + 5e-6
        # Logits rounded to the model's dtype are what this path is better than.
        assert dtype == torch.float32 or off < distance(rough, want) / 50
    # Ranks may differ where two logits are nearer than float32 tells apart.
    assert (made.rank - truth[3]).abs().max() <= 1


@pytest.mark.usefixtures("small_tiles")
def test_rank_is_exact_with_ties():
    """Small whole numbers have exact products, and many equal ones, which do not count."""
    made = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (30, 4), generator=made).float()
    weight = torch.randint(-2, 3, (80, 4), generator=made).float()
    targets = torch.randint(80, (30,), generator=made)
    logits = hidden @ weight.T
    assert ((logits == logits.gather(1, targets[:, None])).sum(1) > 3).any()
    want = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert torch.equal(token_stats(hidden, weight, targets, rank=True).rank, want)


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_whole_tiles_of_minus_infinity(rank):
    """The first tiles hold nothing but banned entries; a banned target costs inf."""
    hidden, weight, targets, bias = tokens(3, 11, 6, 64, ban=40)
    targets[0] = 3
    truth = stats_of(logits_of(hidden, weight, bias), targets)
    for impl in IMPLS:
        made = token_stats(hidden, weight, targets, bias=bias, rank=rank, impl=impl)
        assert made.nll[0] == math.inf
        for name, want in zip(NAMES, truth, strict=False):
            assert distance(getattr(made, name), want) < 5e-6
        if rank:
            assert torch.equal(made.rank, truth[3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("small_tiles")
def test_a_bad_row_spoils_no_other(impl, bad):
    hidden, weight, targets, _ = tokens(4, 12, 6, 30)
    hidden, weight = hidden.abs() + 0.1, weight.abs() + 0.1  # so that inf stays inf
    clean = token_stats(hidden, weight, targets, impl=impl)
    hidden[7, 2] = bad
    made = token_stats(hidden, weight, targets, impl=impl)
    others = torch.arange(12) != 7
    for name in NAMES:
        assert torch.isnan(getattr(made, name)[7])
        assert torch.equal(getattr(made, name)[others], getattr(clean, name)[others])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_possible_is_nan(impl):
    hidden, weight, targets, _ = tokens(5, 3, 4, 6)
    made = token_stats(hidden, weight, targets, bias=torch.full((6,), NEVER), impl=impl)
    assert torch.isnan(made.nll).all() and torch.isnan(made.entropy).all()
    assert (made.lse == NEVER).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_zero_and_the_shape_comes_back(impl):
    hidden, weight, targets, _ = tokens(6, 12, 5, 17)
    flat = token_stats(hidden, weight, targets, rank=True, impl=impl)
    targets = targets.reshape(3, 4)
    kept = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    hidden = hidden.reshape(3, 4, 5).masked_fill(~kept[..., None], math.nan)
    marked = targets.masked_fill(~kept, -7)
    made = token_stats(hidden, weight, marked, ignore_index=-7, rank=True, impl=impl)
    for name in (*NAMES, "rank"):
        found = getattr(made, name)
        assert found.shape == (3, 4)
        assert torch.equal(found[~kept], torch.zeros_like(found[~kept]))
        want = getattr(flat, name).reshape(3, 4)[kept]
        torch.testing.assert_close(found[kept], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (4,), (0, 3), (2, 0)])
def test_empty_and_all_ignored(impl, shape):
    targets = torch.full(shape, -100)
    made = token_stats(torch.randn(*shape, 5), torch.randn(7, 5), targets, rank=True, impl=impl)
    assert isinstance(made, TokenStats)
    for name in (*NAMES, "rank"):
        assert getattr(made, name).shape == shape
        assert not getattr(made, name).any()


@pytest.mark.usefixtures("small_tiles")
def test_one_vector_without_rows():
    made = token_stats(torch.ones(2), torch.eye(2), torch.tensor(1))
    assert made.nll.shape == () and made.nll.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_strides_do_not_matter(dtype):
    hidden, weight, targets, bias = tokens(7, 20, 9, 41, dtype, bias=True)
    want = token_stats(hidden, weight, targets, bias=bias, rank=True)
    apart = torch.stack([hidden, hidden.neg()], 2)[..., 0]
    turned = weight.T.contiguous().T
    wide = torch.stack([targets, targets.neg()], 1)[:, 0]
    thin = torch.stack([bias, bias.neg()], 1)[:, 0]
    assert not any(one.is_contiguous() for one in (apart, turned, wide, thin))
    made = token_stats(apart, turned, wide, bias=thin, rank=True)
    for name in NAMES:
        torch.testing.assert_close(getattr(made, name), getattr(want, name), rtol=0, atol=1e-5)
    assert torch.equal(made.rank, want.rank)


def test_same_bits_twice():
    hidden, weight, targets, _ = tokens(8, 700, 33, 3001)
    one, two = (token_stats(hidden, weight, targets, rank=True) for _ in range(2))
    for name in (*NAMES, "rank"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_rank_changes_nothing_else():
    hidden, weight, targets, _ = tokens(9, 50, 12, 2001)
    one, two = (token_stats(hidden, weight, targets, rank=rank) for rank in (False, True))
    for name in NAMES:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-5)


def test_autocast_and_default_dtype_do_not_reach_in():
    """A training loop's bfloat16 must not round the logits."""
    hidden, weight, targets, _ = tokens(10, 20, 16, 99, spread=15.0)
    want = token_stats(hidden, weight, targets)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = token_stats(hidden, weight, targets)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in NAMES:
        assert torch.equal(getattr(made, name), getattr(want, name))


def test_no_gradient_is_kept():
    hidden, weight, targets, _ = tokens(11, 4, 3, 5)
    for impl in IMPLS:
        made = token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets, impl=impl)
        assert not made.nll.requires_grad


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((HIDDEN, WEIGHT, torch.tensor([0, 4])), {}, r"\[0, 4\).*found 4 at place 1"),
        ((HIDDEN, WEIGHT, torch.tensor([-1, 0])), {}, r"found -1 at place 0"),
        ((HIDDEN, WEIGHT, torch.tensor([-100, 9])), {}, r"found 9 at place 1"),
        ((HIDDEN, WEIGHT, TARGETS[:1]), {}, r"shape of hidden.*\(2,\); found \(1,\)"),
        ((HIDDEN, WEIGHT, TARGETS.int()), {}, "int64; found torch.int32"),
        ((HIDDEN, WEIGHT[:, :2], TARGETS), {}, r"\(2, 3\) and \(4, 2\)"),
        ((HIDDEN, WEIGHT[:0], TARGETS), {}, "at least one row"),
        ((HIDDEN.int(), WEIGHT, TARGETS), {}, "hidden is of a floating dtype"),
        ((HIDDEN, WEIGHT.int(), TARGETS), {}, "weight is of a floating dtype"),
        ((HIDDEN, WEIGHT, TARGETS), {"bias": torch.zeros(3)}, r"\(4,\); found \(3,\)"),
        ((HIDDEN, WEIGHT, TARGETS), {"softcap": 0.0}, "softcap is .* above 0"),
        ((HIDDEN, WEIGHT, TARGETS), {"scale": math.nan}, "scale is .* above 0"),
        ((HIDDEN, WEIGHT, TARGETS), {"impl": "cuda"}, "impl is one of .*'cuda'"),
        ((HIDDEN, WEIGHT, TARGETS), {"impl": "triton"}, "on a GPU"),
        ((HIDDEN, WEIGHT.to("meta"), TARGETS), {}, "one device; found cpu, meta"),
    ],
)
def test_refusals_say_what_was_found(arguments, options, words):
    if options.get("impl") == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(InputError, match=words):
        token_stats(*arguments, **options)
