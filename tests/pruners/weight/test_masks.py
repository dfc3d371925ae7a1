import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.weight.masks import (
    keep_count,
    keep_count_by_row,
    keep_matrix,
    keep_pattern,
    keep_rows,
    keep_wanda,
)


def highest(values, count):
    """Places of the `count` highest of a flat list, the first of equals."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = np.zeros(len(values), bool)
    mask[order[:count]] = True
    return mask


@st.composite
def scores(draw, columns=st.integers(1, 24)):  # noqa: B008
    rows, size = draw(st.integers(1, 6)), draw(columns)
    low = draw(st.sampled_from([0, -5]))
    # Few different values: ties are the rule.
    values = draw(st.lists(st.integers(low, 5), min_size=rows * size, max_size=rows * size))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return torch.tensor(values, dtype=dtype).view(rows, size)


@settings(deadline=None)
@given(scores(), st.floats(0, 1))
def test_counts_are_exact_and_ties_go_to_the_smaller_place(score, keep):
    rows, size = score.shape
    whole = math.ceil(round(keep * rows * size, 9))
    expected = highest(score.view(-1).tolist(), whole).reshape(rows, size)
    assert np.array_equal(keep_matrix(score, keep).numpy(), expected)
    each = math.ceil(round(keep * size, 9))
    expected = np.stack([highest(row.tolist(), each) for row in score])
    assert np.array_equal(keep_rows(score, keep).numpy(), expected)


@settings(deadline=None)
@given(scores(), st.data())
def test_rows_share_a_count_evenly(score, data):
    rows, size = score.shape
    count = data.draw(st.integers(0, rows * size))
    mask = keep_count_by_row(score, count)
    assert int(mask.sum()) == count
    each, more = divmod(count, rows)
    expected = np.stack([highest(row.tolist(), each + (i < more)) for i, row in enumerate(score)])
    assert np.array_equal(mask.numpy(), expected)


@settings(deadline=None)
@given(scores(st.sampled_from([4, 8, 16])), st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 4)]))
def test_patterns(score, pattern):
    n, m = pattern
    mask = keep_pattern(score, n, m)
    groups = score.reshape(-1, m)
    expected = np.stack([highest(group.tolist(), n) for group in groups])
    assert np.array_equal(mask.reshape(-1, m).numpy(), expected)


def test_wanda_in_one_read_is_the_score_then_the_mask():
    made = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(7, 33, generator=made), torch.rand(33, generator=made)
    for count in (0, 50, 116, 7 * 33):
        expected = keep_count_by_row(weight.abs() * norm, count)
        assert torch.equal(keep_wanda(weight, norm, count), expected)


def test_bad_input():
    score = torch.ones(2, 6)
    with pytest.raises(InputError, match="multiple|divides"):
        keep_pattern(score, 2, 4)
    with pytest.raises(InputError, match="3:2"):
        keep_pattern(score, 3, 2)
    with pytest.raises(InputError, match="0 to 12.*13"):
        keep_count(score, 13)
    with pytest.raises(InputError, match="0 to 12.*-1"):
        keep_count_by_row(score, -1)
    with pytest.raises(InputError, match="keep"):
        keep_matrix(score, 1.5)
    with pytest.raises(InputError, match=r"\(out, in\)"):
        keep_count(score[0], 1)
    score[1, 4] = math.nan
    for call in (lambda: keep_count(score, 3), lambda: keep_rows(score, 0.5)):
        with pytest.raises(InputError, match="row 1, column 4"):
            call()
