import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import BudgetError, InputError
from prunery.pruners.balance import Balance, balanced
from prunery.pruners.contract import Selection, Signals
from prunery.pruners.sample.random import Random


def chosen(score, keep, rival=None):
    """A method's selection with those scores."""
    keep = np.array(keep, bool)
    return Selection(
        keep,
        np.array(score, np.float32),
        (~keep).astype(np.uint8),
        ("high", "low"),
        rival=np.full(len(keep), -1) if rival is None else np.array(rival),
    )


def names(selection):
    return list(zip(selection.keep.tolist(), selection.reason_names(), strict=True))


def test_a_floor_keeps_the_best_row_of_a_class_that_would_be_empty():
    # Six rows of class 0 outscore both of class 1; half are kept: shares 3 and 1.
    selection = chosen([9, 8, 7, 6, 5, 4, 1, 2], [1, 1, 1, 1, 0, 0, 0, 0])
    ids, group = np.arange(8), np.array([0] * 6 + [1] * 2)
    made = balanced(selection, ids, group, Balance(floor=0.5))
    assert names(made) == [
        (True, "high"),
        (True, "high"),
        (True, "high"),
        (False, "gave_way"),
        (False, "low"),
        (False, "low"),
        (False, "low"),
        (True, "kept_for_group"),
    ]
    assert made.weight.tolist() == [1, 1, 1, 0, 0, 0, 0, 1]


def test_a_cap_sends_rows_of_a_full_class_away():
    # Four of eight, two classes of four: shares 2 and 2, a cap of 1.5 makes it 3.
    selection = chosen([9, 8, 7, 6, 4, 3, 2, 1], [1, 1, 1, 1, 0, 0, 0, 0])
    made = balanced(selection, np.arange(8), np.repeat([0, 1], 4), Balance(cap=1.5))
    assert made.keep.tolist() == [True] * 3 + [False] + [True] + [False] * 3
    assert made.reason_names()[3:5] == ["group_full", "kept_for_group"]


def test_nothing_changes_where_no_limit_binds():
    selection = chosen([4, 1, 3, 2], [1, 0, 1, 0])
    made = balanced(selection, np.arange(4), np.array([0, 0, 1, 1]), Balance(floor=1.0, cap=1.0))
    assert np.array_equal(made.keep, selection.keep)
    assert made.reason_names() == ["high", "low", "high", "low"]


def test_floor_and_cap_of_one_are_the_stratified_share():
    ids = np.arange(1000)
    group = np.repeat([0, 1, 2], [700, 200, 100])
    selection = Random(keep=0.1)(Signals({"id": ids}), seed=0)
    made = balanced(selection, ids, group, Balance(floor=1.0, cap=1.0))
    assert np.bincount(group[made.keep]).tolist() == [70, 20, 10]


def test_the_rows_a_method_kept_come_before_higher_scores_it_dropped():
    # A method may drop a high score for its own reason; balance does not undo that.
    selection = chosen([9, 5, 4, 8], [0, 1, 1, 0])
    made = balanced(selection, np.arange(4), np.array([0, 0, 0, 1]), Balance(floor=0.1))
    assert made.keep.tolist() == [False, True, False, True]


def test_room_beyond_the_floors_goes_to_kept_rows_first():
    selection = chosen([9, 5, 4, 3, 1, 8], [0, 1, 1, 1, 0, 0])
    made = balanced(selection, np.arange(6), np.array([0] * 5 + [1]), Balance(floor=0.1))
    assert made.keep.tolist() == [False, True, True, False, False, True]


def test_ties_go_to_the_smaller_id():
    selection = chosen([1, 1, 1, 1], [0, 0, 1, 1])
    made = balanced(
        selection, np.array([4, 3, 2, 1]), np.array([0, 0, 1, 1]), Balance(floor=1.0, cap=1.0)
    )
    assert made.keep.tolist() == [False, True, False, True]


def test_a_rival_that_went_is_no_rival():
    selection = chosen([9, 8, 1], [1, 1, 0], rival=[-1, -1, 1])
    made = balanced(selection, np.arange(3), np.array([0, 0, 1]), Balance(floor=1.0))
    assert made.keep.tolist() == [True, False, True]
    assert made.rival.tolist() == [-1, -1, -1]


def test_more_groups_than_rows_is_refused():
    selection = chosen([3, 2, 1], [1, 0, 0])
    with pytest.raises(BudgetError, match="3 groups, and the budget is 1 rows"):
        balanced(selection, np.arange(3), np.arange(3), Balance(floor=0.5))


def test_many_small_groups_lower_the_floor_of_the_large_one():
    # 10 rows of 104: the large group's floor of 9 and a row of each small one make 13.
    fewest, most = Balance(floor=1.0, cap=1.0).limits(np.array([100, 1, 1, 1, 1]), 10)
    assert fewest.tolist() == [6, 1, 1, 1, 1]
    assert most.sum() >= 10


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_a_floor_out_of_range_is_refused(floor):
    with pytest.raises(InputError, match="floor"):
        Balance(floor=floor)


@pytest.mark.parametrize("cap", [0.9, float("inf"), float("nan")])
def test_a_cap_out_of_range_is_refused(cap):
    with pytest.raises(InputError, match="cap"):
        Balance(cap=cap)


def test_misaligned_groups_are_refused():
    with pytest.raises(InputError, match="as many ids and groups"):
        balanced(chosen([1], [1]), np.arange(1), np.arange(2), Balance())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(0, 1),
    st.one_of(st.none(), st.floats(1, 3)),
)
def test_limits_and_count_hold(rows, keep, floor, cap):
    group = np.array([row[0] for row in rows])
    ids = np.arange(len(rows))
    selection = Random(keep=keep)(Signals({"id": ids}), seed=1)
    balance = Balance(floor=floor, cap=cap)
    classes, sizes = np.unique(group, return_counts=True)
    if floor > 0 and 0 < selection.kept < len(classes):
        with pytest.raises(BudgetError):
            balanced(selection, ids, group, balance)
        return
    made = balanced(selection, ids, group, balance)
    assert made.kept == selection.kept
    fewest, most = balance.limits(sizes, selection.kept)
    counts = np.array([(made.keep & (group == name)).sum() for name in classes])
    assert (counts >= fewest).all() and (counts <= most).all()
    assert fewest.sum() <= made.kept <= most.sum()
    assert not made.weight[~made.keep].any() and (made.weight[made.keep] > 0).all()
