"""Golden cases of the methods over single weights, worked by hand; ERK's densities."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.rules import uniform
from prunery.pruners.weight.erk import erk_densities
from prunery.pruners.weight.gblm import Gblm
from prunery.pruners.weight.magnitude import Magnitude
from prunery.pruners.weight.random_weights import RandomWeights
from prunery.pruners.weight.sparsegpt import SparseGpt
from prunery.pruners.weight.wanda import Wanda


def rows(**arrays):
    n = len(next(iter(arrays.values())))
    return Signals({"id": np.arange(n), **arrays})


def test_magnitude():
    signals = rows(weight=[0.5, -2.0, 1.0, -0.25])
    selection = Magnitude(keep=0.5)(signals, seed=0)
    assert selection.keep.tolist() == [False, True, True, False]
    assert selection.score.tolist() == [0.5, 2.0, 1.0, 0.25]
    assert selection.threshold.tolist() == [1.0] * 4
    assert selection.dropped() == {"unimportant": 2}


def test_wanda_compares_within_a_row():
    # Row 0 has scores 2, 3, 1; row 1 has 20, 30, 40: each loses its lowest.
    signals = rows(
        output=[0, 0, 0, 1, 1, 1],
        weight=[2.0, -1.0, 0.25, 20.0, 10.0, -10.0],
        input_norm=[1.0, 3.0, 4.0, 1.0, 3.0, 4.0],
    )
    selection = Wanda(keep=2 / 3)(signals, seed=0)
    assert selection.score.tolist() == [2.0, 3.0, 1.0, 20.0, 30.0, 40.0]
    assert selection.keep.tolist() == [True, True, False, False, True, True]


def test_sparsegpt_divides_by_the_inverse_hessian():
    # 4 / 4 = 1, 1 / 0.25 = 4, 9 / 3 = 3, 0.25 / 1 = 0.25
    signals = rows(weight=[2.0, -1.0, 3.0, 0.5], hessian_diagonal=[4.0, 0.25, 3.0, 1.0])
    selection = SparseGpt(keep=0.5)(signals, seed=0)
    assert selection.score.tolist() == [1.0, 4.0, 3.0, 0.25]
    assert selection.keep.tolist() == [False, True, True, False]


def test_gblm_adds_the_gradient():
    # 1 * (3 + 100 * 0), 2 * (1 + 100 * 0.02), 0.5 * (4 + 100 * 0.01) = 3, 6, 2.5
    arrays = {
        "output": [0, 0, 0],
        "weight": [1.0, -2.0, 0.5],
        "input_norm": [3.0, 1.0, 4.0],
        "weight_gradient": [0.0, 0.02, 0.01],
    }
    selection = Gblm(keep=1 / 3)(rows(**arrays), seed=0)
    np.testing.assert_allclose(selection.score, [3.0, 6.0, 2.5], rtol=1e-6)
    assert selection.keep.tolist() == [False, True, False]
    # Without the gradient the scores are Wanda's 3, 2, 2.
    plain = Gblm(keep=1 / 3, scale=0.0)(rows(**arrays), seed=0)
    assert plain.keep.tolist() == [True, False, False]


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"scale": math.nan}, {"norm": "l3"}])
def test_gblm_refuses_options(options):
    with pytest.raises(InputError, match=f"`{next(iter(options))}`"):
        Gblm(**options)


def test_random_weights_are_drawn_from_seed_and_id():
    signals = Signals({"id": [5, 3, 9, 1]})
    selection = RandomWeights(keep=0.5)(signals, seed=11)
    drawn = uniform(11, signals["id"])
    best = sorted(range(4), key=lambda i: -drawn[i])[:2]
    assert sorted(np.flatnonzero(selection.keep)) == sorted(best)


def test_erk_by_hand():
    # Equal eps * (in + out): (2, 2) would keep 4 eps of 4, (10, 10) 20 eps of 100. At density
    # 0.5 of 104: eps = 52 / 24 > 1, so the small one is dense and the other keeps 48 of 100.
    assert erk_densities([(2, 2), (10, 10)], 0.5) == pytest.approx([1.0, 0.48])
    # At 0.1: eps = 10.4 / 24, and 4 eps of 4, 20 eps of 100 stay.
    eps = 10.4 / 24
    assert erk_densities([(2, 2), (10, 10)], 0.1) == pytest.approx([eps, 20 * eps / 100])


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_erk_meets_the_budget(shapes, density):
    densities = erk_densities(shapes, density)
    assert all(0 <= d <= 1 + 1e-12 for d in densities)
    kept = sum(d * a * b for d, (a, b) in zip(densities, shapes, strict=True))
    total = sum(a * b for a, b in shapes)
    assert kept == pytest.approx(density * total, rel=1e-9, abs=1e-9)
    free = [d * a * b / (a + b) for d, (a, b) in zip(densities, shapes, strict=True) if d < 1]
    assert np.ptp(free) < 1e-9 * max(free) + 1e-12 if free else True


def test_erk_refuses_an_empty_tensor():
    with pytest.raises(InputError, match="place 1"):
        erk_densities([(2, 2), (0, 3)], 0.5)
    with pytest.raises(InputError, match="density"):
        erk_densities([(2, 2)], 1.5)
