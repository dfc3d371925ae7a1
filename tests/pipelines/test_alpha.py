import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pipelines.alpha import POINTS, choose_alpha, doubted, prior_alpha


def test_a_row_of_a_negative_mean_margin_is_doubted():
    margins = np.array([[3.0, -1.0], [1.0, -2.0], [-1.0, -1.0], [0.0, 0.0]], np.float32)
    assert doubted(margins).tolist() == [False, True, True, False]
    assert doubted(margins[:0]).tolist() == []


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.05, 1.0), (0.3, 1.0), (0.5, 0.75), (0.7, 0.5), (1.0, 0.375)]
)
def test_the_prior_falls_with_the_kept_fraction(fraction, expected):
    assert prior_alpha(fraction, 0.1, 0.1) == pytest.approx(expected)


def test_the_prior_falls_where_noise_was_taken_out():
    assert prior_alpha(0.3, 0.05, 0.1) == pytest.approx(0.5)
    assert prior_alpha(0.3, 0.0, 0.1) == pytest.approx(0.25)
    assert prior_alpha(0.3, 0.2, 0.1) == pytest.approx(1.0)
    # too little noise to tell from none
    assert prior_alpha(0.3, 0.0, 0.01) == pytest.approx(1.0)
    assert prior_alpha(0.3, math.nan, 0.5) == pytest.approx(1.0)


def test_a_clear_best_is_taken_whatever_the_prior():
    curve = dict(zip(POINTS, (0.5, 0.9, 0.6, 0.6, 0.6), strict=True))
    assert choose_alpha(curve, 1000, prior=1.0) == 0.25


def test_among_the_near_best_the_prior_decides():
    # On 100 rows the standard error at 0.9 is 0.03: 0.88 and 0.9 are the same, 0.86 is not.
    curve = dict(zip(POINTS, (0.86, 0.9, 0.88, 0.88, 0.86), strict=True))
    assert choose_alpha(curve, 100, prior=1.0) == 0.75
    assert choose_alpha(curve, 100, prior=0.0) == 0.25
    assert choose_alpha(curve, 10_000, prior=1.0) == 0.25


def test_of_two_as_close_the_lower_is_taken():
    assert choose_alpha({0.25: 0.9, 0.75: 0.9}, 10, prior=0.5) == 0.25


def test_a_curve_without_points_or_rows_is_refused():
    with pytest.raises(InputError, match="0 points"):
        choose_alpha({}, 5, prior=0.5)
    with pytest.raises(InputError, match="on 0 rows"):
        choose_alpha({0.0: 1.0}, 0, prior=0.5)
