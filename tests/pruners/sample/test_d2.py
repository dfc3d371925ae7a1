"""D2: by hand, against a plain search for the highest row, and its cost on a large graph."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.sample.d2 import D2

LN2 = math.log(2)


def graph(difficulty, neighbour, distance, ids=None):
    ids = np.arange(len(difficulty)) if ids is None else ids
    return Signals(
        {
            "id": ids,
            "difficulty": np.asarray(difficulty, np.float32),
            "neighbour": np.asarray(neighbour),
            "neighbour_distance": np.asarray(distance, np.float32),
        }
    )


def order_of(selection):
    return np.argsort(-selection.score, kind="stable").tolist()


def test_golden():
    # Row 0 lists 1, row 1 lists 0, row 2 lists 3, row 3 lists nobody, all at exp(-d) = 1/2.
    # x = 1 + 0.25, 0.5 + 0.5, 0 + 0.4, 0.8. Row 0 goes first and takes 0.625 off row 1 (0.375
    # left); then row 3, which sends nothing; then row 2 (0.4); then row 1.
    signals = graph([1.0, 0.5, 0.0, 0.8], [[1], [0], [3], [-1]], [[LN2], [LN2], [LN2], [0.0]])
    selection = D2(keep=0.75, gamma=1.0)(signals, seed=0)
    assert order_of(selection) == [0, 3, 2, 1]
    assert selection.score.tolist() == [0.0, -3.0, -2.0, -1.0]
    assert selection.keep.tolist() == [True, False, True, True]
    assert selection.reason_names()[:2] == ["in_share", "beyond_share"]
    # With gamma 0 the message does not fade: row 1 falls to -0.25. The order stays, and where
    # one row is taken the others follow by what they have left.
    assert order_of(D2(keep=0.25, gamma=0.0)(signals, seed=0)) == [0, 3, 2, 1]


def test_spread_beats_difficulty():
    # Two near twins of difficulty 1 and 0.9, and a lone row of 0.3.
    signals = graph([1.0, 0.9, 0.3, 0.0], [[1], [0], [-1], [-1]], [[0.01], [0.01], [0.0], [0.0]])
    selection = D2(keep=0.5)(signals, seed=0)
    assert selection.keep.tolist() == [True, False, True, False]


def test_dense_places_come_first():
    # Equal difficulty: the row with most near neighbours is taken first.
    neighbour = [[1, 2], [-1, -1], [1, -1]]
    signals = graph([0.5] * 3, neighbour, [[0.1, 0.1], [0, 0], [0.1, 0]])
    assert order_of(D2(keep=1.0)(signals, seed=0))[0] == 0


def test_difficulty_below_zero_and_in_any_unit():
    neighbour, distance = [[1], [0], [3], [-1]], [[LN2], [LN2], [LN2], [0.0]]
    base = np.array([1.0, 0.5, 0.0, 0.8])
    expected = D2(keep=0.5)(graph(base, neighbour, distance), seed=0).score.tolist()
    for scaled in (base - 7.0, 40 * base - 3.0):
        selection = D2(keep=0.5)(graph(scaled, neighbour, distance), seed=0)
        assert selection.score.tolist() == expected


def test_unknown_neighbours_are_ignored():
    ids = np.array([30, 10, 20])
    plain = graph([1.0, 0.5, 0.0], [[10], [30], [-1]], [[0.2], [0.2], [0.0]], ids)
    noisy = graph(
        [1.0, 0.5, 0.0],
        [[10, 999, 30], [30, 5, 11], [-1, 31, 20]],  # of other tables, and themselves
        [[0.2, 0.0, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0]],
        ids,
    )
    expected = D2(keep=0.7)(plain, seed=0).score.tolist()
    assert D2(keep=0.7)(noisy, seed=0).score.tolist() == expected


@pytest.mark.parametrize("listed", [20, 5, 31, -1])
def test_itself_and_strangers_add_nothing(listed):
    # Counted as itself or as the row next to it among the ids, it would lift row 20 above row 10.
    signals = graph(
        [1.0, 0.6, 0.9, 0.0], [[-1], [listed], [-1], [-1]], [[0.0]] * 4, [10, 20, 30, 1]
    )
    assert order_of(D2(keep=1.0)(signals, seed=0)) == [0, 2, 1, 3]


def test_no_neighbours_at_all_is_an_order_by_difficulty():
    signals = graph([0.2, 0.9, 0.5], np.zeros((3, 0), np.int64), np.zeros((3, 0)))
    assert order_of(D2(keep=0.4)(signals, seed=0)) == [1, 2, 0]


def test_cut_rows_send_no_message_and_come_back_last():
    # Row 0 is the hardest and would silence row 1.
    signals = graph([9.0, 1.0, 0.8, 0.0], [[1], [0], [-1], [-1]], [[0.0], [0.0], [0.0], [0.0]])
    assert D2(keep=0.5)(signals, seed=0).keep.tolist() == [True, False, True, False]
    selection = D2(keep=0.25, cutoff=0.25)(signals, seed=0)
    assert selection.keep.tolist() == [False, True, False, False]
    assert selection.reason_names()[0] == "cut_as_hardest"
    assert order_of(selection) == [1, 2, 3, 0]
    assert D2(keep=1.0, cutoff=0.25)(signals, seed=0).reason_names()[0] == "refilled"


@pytest.mark.parametrize("value", [0.0, -3.0, 2.0])
def test_constant_difficulty_meets_the_budget(value):
    neighbour = [[1], [2], [3], [4], [0]]
    signals = graph([value] * 5, neighbour, np.full((5, 1), 0.3))
    for count in range(6):
        assert D2(keep=count / 5)(signals, seed=0).kept == count
    # The ring is the same all round: 0 first, and then not its neighbour 1.
    assert D2(keep=0.4)(signals, seed=0).keep.tolist() == [True, False, True, False, False]


def by_search(difficulty, neighbour, distance, gamma):
    """The order in which rows are taken, by looking for the highest each time."""
    n = len(difficulty)
    x = difficulty.copy()
    for i in range(n):
        for j, d in zip(neighbour[i], distance[i], strict=True):
            x[i] += math.exp(-d) * difficulty[j]
    left, order = set(range(n)), []
    while left:
        i = max(sorted(left), key=lambda row: x[row])
        left.remove(i)
        order.append(i)
        for j, d in zip(neighbour[i], distance[i], strict=True):
            x[j] -= math.exp(-gamma * d) * x[i]
    return order


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(5, 40), k=st.integers(1, 4), gamma=st.floats(0, 3)
)
def test_the_heap_finds_what_a_search_finds(seed, n, k, gamma):
    rng = np.random.default_rng(seed)
    # Below zero x rises again: near neighbours and a weak fade make that common.
    neighbour = np.array([rng.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)])
    distance = rng.exponential(0.5, (n, k)).astype(np.float32)
    difficulty = rng.random(n)
    difficulty[:2] = 0.0, 1.0
    difficulty = difficulty.astype(np.float32).astype(np.float64)
    expected = by_search(difficulty, neighbour, distance.astype(np.float64), gamma)
    selection = D2(keep=1.0, gamma=gamma)(graph(difficulty, neighbour, distance), seed=0)
    assert order_of(selection) == expected


def test_memory_grows_with_the_edges_alone():
    """A square of the rows would be 3 GB of float32 here."""
    n, k = 30_000, 5
    rng = np.random.default_rng(0)
    neighbour = rng.integers(0, n, (n, k))
    signals = graph(rng.random(n), neighbour, rng.random((n, k)))
    import tracemalloc

    tracemalloc.start()
    selection = D2(keep=0.3)(signals, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert selection.kept == 9000
    assert peak < n * k * 200


def test_neighbours_and_distances_of_different_width():
    signals = graph([1.0, 0.0], [[1], [0]], [[0.1, 0.2], [0.1, 0.2]])
    with pytest.raises(InputError, match=r"\(2, 1\) and \(2, 2\)"):
        D2()(signals, seed=0)


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"gamma": math.inf}, {"cutoff": -0.1}])
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        D2(**options)
