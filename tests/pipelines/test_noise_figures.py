import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.noise_figures import noise_rows


def test_auc_and_found_by_hand():
    score = np.array([5, 4, 3, 2, 1, 0], np.float32)
    flipped = np.array([True, False, True, False, False, False])
    (row,) = noise_rows({"aum": score}, flipped)
    # Pairs of a wrong and a right label: 5 beats 4, 2, 1, 0; 3 beats 2, 1, 0 and loses to 4.
    assert row == {
        "score": "aum",
        "higher_is": "harder",
        "auc": pytest.approx(7 / 8),
        "found": 1,
        "planted": 2,
        "looked": 2,
    }


def test_a_tie_counts_half_and_goes_to_the_smaller_id():
    score = np.zeros(4, np.float32)
    flipped = np.array([False, False, True, True])
    by_place, by_id = (
        noise_rows({"s": score}, flipped, ids=ids)[0] for ids in (None, np.array([9, 8, 7, 6]))
    )
    assert by_place["auc"] == by_id["auc"] == 0.5
    assert (by_place["found"], by_id["found"]) == (0, 2)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({flag for _, flag in rows}) == 2
    )
)
def test_auc_is_the_share_of_pairs(rows):
    score = np.array([value for value, _ in rows], np.float32)
    flipped = np.array([flag for _, flag in rows])
    wins = [(a > b) + (a == b) / 2 for a in score[flipped] for b in score[~flipped]]
    (row,) = noise_rows({"s": score}, flipped)
    assert row["auc"] == pytest.approx(np.mean(wins))
    assert row["planted"] == row["looked"] == flipped.sum()
    assert noise_rows({"s": -score}, flipped)[0]["auc"] == pytest.approx(1 - np.mean(wins))


@pytest.mark.parametrize("flag", [True, False])
def test_without_both_kinds_there_is_no_auc(flag):
    (row,) = noise_rows({"s": np.arange(3, dtype=np.float32)}, np.full(3, flag))
    assert math.isnan(row["auc"])
    assert row["found"] == row["planted"] == row["looked"] == 3 * flag


def test_bad_scores_are_refused_by_name():
    flipped = np.array([True, False])
    with pytest.raises(
        InputError, match=r"`aum` and the ids must have one entry for each of the 2 rows"
    ):
        noise_rows({"aum": np.zeros(3, np.float32)}, flipped)
    bad = np.array([0, np.nan], np.float32)
    with pytest.raises(InputError, match="`aum` must be finite; row 8"):
        noise_rows({"aum": bad}, flipped, ids=np.array([7, 8]))
    assert noise_rows({}, flipped) == []
