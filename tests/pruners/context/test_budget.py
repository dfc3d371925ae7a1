import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import BudgetError
from prunery.pruners.context.budget import fit_tokens


def fit(limit, *, score, tokens, passage=None, keep=None, forced=None, title=None):
    n = len(score)
    return fit_tokens(
        np.ones(n, bool) if keep is None else np.array(keep, bool),
        np.array(score, np.float32),
        np.arange(n),
        np.array(tokens),
        np.zeros(n, np.int64) if passage is None else np.array(passage),
        limit,
        forced=np.zeros(n, bool) if forced is None else np.array(forced, bool),
        title=np.zeros(n, bool) if title is None else np.array(title, bool),
    ).tolist()


def test_best_first_and_shorter_ones_fill_the_room():
    # 5 tokens fit the best; the second (6) does not fit in the 3 left; the third (3) does.
    assert fit(8, score=[0.9, 0.8, 0.7, 0.6], tokens=[5, 6, 3, 1]) == [True, False, True, False]


def test_ties_go_to_the_smaller_id():
    assert fit(4, score=[0.5, 0.5, 0.5], tokens=[2, 2, 2]) == [True, True, False]


def test_a_title_is_paid_with_the_first_sentence_of_its_passage():
    arrays = {"score": [0, 0.9, 0.8, 0, 0.7], "tokens": [3, 2, 2, 3, 2]}
    arrays |= {"passage": [0, 0, 0, 1, 1], "title": [1, 0, 0, 1, 0]}
    # 3 + 2 for passage 0, 2 more for its second sentence; passage 1 would take 5.
    assert fit(11, **arrays) == [True, True, True, False, False]
    assert fit(12, **arrays) == [True, True, True, True, True]
    assert fit(4, **arrays) == [False] * 5


def test_forced_rows_are_paid_first_or_refused():
    arrays = {"score": [0.9, 0.1], "tokens": [3, 4], "forced": [0, 1]}
    assert fit(4, **arrays) == [False, True]
    with pytest.raises(BudgetError, match="take 4 tokens, more than max_tokens=3"):
        fit(3, **arrays)


def test_nothing_enters_that_was_not_kept():
    assert fit(9, score=[0.9, 0.1], tokens=[1, 1], keep=[0, 1]) == [False, True]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_never_over_the_limit(data):
    n = data.draw(st.integers(0, 12))
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    score = data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=n, max_size=n))
    passage = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    keep, forced = data.draw(flags), data.draw(flags)
    title = [p not in passage[:i] for i, p in enumerate(passage)]
    limit = data.draw(st.integers(0, 40))
    arrays = {"score": score, "tokens": tokens, "passage": passage, "keep": keep}
    try:
        made = fit(limit, forced=forced, title=title, **arrays)
    except BudgetError:
        return
    assert sum(t for t, kept in zip(tokens, made, strict=True) if kept) <= limit
    assert all(was or not now for was, now in zip(keep, made, strict=True))
    assert all(now for was, f, now in zip(keep, forced, made, strict=True) if was and f)
