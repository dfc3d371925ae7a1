"""k_center_step: the reference against the words, torch against the truth, borders, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.kernels import KCenterStep, centers_torch, k_center_step

from .cases import cluster_rows, distance, step_of

IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl):
    """Cosines to (1, 0): 1, 0.6, 0, -1 and 0.6; row 3 is chosen, row 1 keeps its 0.3."""
    points = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0], [0.6, -0.8]])
    away = torch.tensor([0.5, 0.3, 1.0, -1.0, 3.0])
    nearest = torch.arange(5) + 10
    made = k_center_step(points, points[0], away, nearest=nearest, number=7, impl=impl)
    assert away.tolist() == pytest.approx([0.0, 0.3, 1.0, -1.0, 0.4], abs=1e-6)
    assert away[0] == 0.0
    # Row 2 was at 1 before: as near as now, so its centre stays.
    assert nearest.tolist() == [7, 11, 12, 13, 7]
    assert isinstance(made, KCenterStep)
    assert (made.distance.item(), made.index.item()) == (1.0, 2)
    assert made.distance.shape == made.index.shape == ()
    assert made.distance.dtype == torch.float32 and made.index.dtype == torch.int64


@pytest.mark.parametrize("impl", IMPLS)
def test_below_a_millionth_is_a_copy(impl):
    points = torch.tensor([[1 - 0.9e-6], [1 - 1.1e-6], [1 + 1e-5]])
    away = torch.full((3,), 3.0)
    k_center_step(points, torch.ones(1), away, impl=impl)
    assert (away == 0.0).tolist() == [True, False, True]
    assert away[1].item() == pytest.approx(1.1e-6, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    centre_dtype=st.sampled_from(DTYPES),
    track=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_torch_is_as_near_to_the_truth_as_plain(rows, size, dtype, centre_dtype, track, seed):
    points, centre, away = cluster_rows(seed, rows, size)
    points, centre = points.to(dtype), centre.to(centre_dtype)
    truth, plain = (step_of(points, centre, away, kind) for kind in (torch.float64, torch.float32))
    nearest = torch.full((rows,), -5) if track else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centers_torch, "CPU_CELLS", 7 * size)
        step = k_center_step(points, centre, away, nearest=nearest, number=9)
    assert distance(away, truth) <= distance(plain, truth) + 1e-6
    assert step.distance == away.max()
    assert step.index == (away.argmax() if away.max() >= 0 else -1)
    if track:
        # Where float32 can tell which is nearer, it must.
        known = cluster_rows(seed, rows, size)[2]
        assert (nearest[truth < known - 1e-5] == 9).all()
        assert (nearest[truth >= known] == -5).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_and_chosen_rows(impl):
    points = torch.eye(4).repeat(3, 1)
    away = torch.full((12,), 3.0)
    away[1] = -1.0
    made = k_center_step(points, points[0], away, impl=impl)
    assert (made.distance.item(), made.index.item()) == (1.0, 2)
    assert away[1] == -1.0
    away.fill_(-1.0)
    made = k_center_step(points, points[0], away, impl=impl)
    assert (made.distance.item(), made.index.item()) == (-1.0, -1)
    assert (away == -1.0).all()
    made = k_center_step(points[:0], points[0], away[:0], impl=impl)
    assert (made.distance.item(), made.index.item()) == (-1.0, -1)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_is_left_and_not_chosen(impl):
    away = torch.tensor([-1.0, 0.0])
    made = k_center_step(torch.ones(2, 1), torch.ones(1), away, impl=impl)
    assert (made.distance.item(), made.index.item()) == (0.0, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_changes_nothing(impl):
    points, centre, away = cluster_rows(3, 9, 5)
    clean = away.clone()
    k_center_step(points, centre, clean, impl=impl)
    points[4, 2] = math.nan
    known, nearest = away.clone(), torch.zeros(9, dtype=torch.int64)
    k_center_step(points, centre, away, nearest=nearest, number=1, impl=impl)
    others = torch.arange(9) != 4
    assert away[4] == known[4] and nearest[4] == 0
    assert torch.equal(away[others], clean[others])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_gradients_autocast_and_no_coordinates(impl):
    points, centre, away = cluster_rows(4, 20, 9)
    want = away.clone()
    k_center_step(points, centre, want, impl=impl)
    turned = points.T.contiguous().T.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = k_center_step(turned, torch.stack([centre] * 2, 1)[:, 0], away, impl=impl)
    torch.testing.assert_close(away, want, rtol=0, atol=2e-7)
    assert not made.distance.requires_grad
    away = torch.full((2,), 3.0)
    k_center_step(torch.zeros(2, 0), torch.zeros(0), away, impl=impl)
    assert (away == 1.0).all()


POINTS, CENTRE, AWAY = torch.zeros(3, 2), torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((POINTS, CENTRE[:1], AWAY), {}, r"\(3, 2\) and \(1,\)"),
        ((POINTS.int(), CENTRE, AWAY), {}, "points is of a floating dtype"),
        ((POINTS, CENTRE.int(), AWAY), {}, "centre is of a floating dtype"),
        ((POINTS, CENTRE.to("meta"), AWAY), {}, "centre is on cpu; found meta"),
        ((POINTS, CENTRE, AWAY[:2]), {}, r"distance is \(3,\) .* found \(2,\)"),
        ((POINTS, CENTRE, AWAY.double()), {}, "found .* torch.float64"),
        ((POINTS, CENTRE, torch.zeros(3, 2)[:, 0]), {}, r"contiguous.*strides \(2,\)"),
        ((POINTS, CENTRE, AWAY), {"nearest": AWAY}, "nearest is .* torch.int64.*torch.float32"),
        ((POINTS, CENTRE, AWAY), {"impl": "cuda"}, "impl is one of .*'cuda'"),
    ],
)
def test_refusals_say_what_was_found(arguments, options, words):
    with pytest.raises(InputError, match=words):
        k_center_step(*arguments, **options)
