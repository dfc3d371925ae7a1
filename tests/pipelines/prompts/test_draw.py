"""Few-shot parts: balanced, disjoint in text, drawn from (seed, id), every row accounted for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines.prompts.draw import draw_parts, text_key
from prunery.pruners import rules


def draw(labels, texts, is_test, *, ids=None, classes=("a", "b"), **options):
    given = {"shots": 1, "validation_shots": 1, "test_rows": None, "draw": "first", "seed": 0}
    return draw_parts(
        np.arange(len(labels)) if ids is None else np.asarray(ids, np.int64),
        np.asarray(labels, np.int64),
        np.asarray(is_test, bool),
        texts,
        classes,
        **{**given, **options},
    )


def parts(made):
    return [(row.row, row.part, row.shot, row.label) for row in made.rows]


def test_first_takes_rows_in_the_order_of_the_data():
    labels = [1, 0, 0, 1, 0, 1, 0, 1]
    made = draw(labels, [f"t{i}" for i in range(8)], [0, 0, 0, 0, 0, 0, 1, 1])
    assert parts(made) == [
        (1, "train", 0, 0),
        (0, "train", 0, 1),
        (2, "validation", 0, 0),
        (3, "validation", 0, 1),
        (6, "test", 0, 0),
        (7, "test", 0, 1),
    ]
    assert made.dropped == {"not_drawn": 2}


def test_random_takes_the_smallest_draws_whatever_the_order_of_the_rows():
    ids = np.arange(100, 140)
    labels = np.arange(40) % 2
    is_test = np.arange(40) >= 30
    texts = [f"text {i}" for i in ids]
    made = draw(labels, texts, is_test, ids=ids, draw="random", shots=3, test_rows=4, seed=5)
    u = rules.uniform(5, ids)
    for label in (0, 1):
        ranked = sorted((i for i in range(30) if labels[i] == label), key=lambda i: u[i])
        for part, wanted in (("train", ranked[:3]), ("validation", ranked[3:4])):
            got = [row.row for row in made.rows if (row.part, row.label) == (part, label)]
            assert got == wanted
    tested = {row.row for row in made.rows if row.part == "test"}
    assert tested == set(sorted(range(30, 40), key=lambda i: u[i])[:4])
    flip = np.random.default_rng(0).permutation(40)
    again = draw(
        labels[flip], [texts[i] for i in flip], is_test[flip], ids=ids[flip],
        draw="random", shots=3, test_rows=4, seed=5,
    )  # fmt: skip
    assert [(flip[r.row], r.part, r.shot, r.label) for r in again.rows] == parts(made)
    other = draw(labels, texts, is_test, ids=ids, draw="random", shots=3, test_rows=4, seed=6)
    assert parts(other) != parts(made)


def test_a_text_stands_in_one_part_and_once():
    texts = ["One  two", "x", "one two", "ＯＮＥ\ttwo", "b1", "b2", "ONE TWO", "B1", "new", "new "]
    labels = [0, 1, 0, 0, 0, 1, 1, 0, 1, 0]
    is_test = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    made = draw(labels, texts, is_test)
    by_part = {
        part: [texts[r.row] for r in made.rows if r.part == part]
        for part in ("train", "validation", "test")
    }
    assert by_part["train"] == ["One  two", "x"]
    assert by_part["validation"] == ["b1", "b2"]
    assert len(by_part["test"]) == 1 and by_part["test"][0].strip() == "new"
    assert made.dropped == {"seen_in_train": 3, "seen_in_validation": 1, "repeated": 1}


def test_a_text_under_two_labels_is_taken_once():
    labels = [0, 1, 0, 1, 0, 1, 0]
    texts = ["same", "same", "p", "q", "r", "s", "t"]
    made = draw(labels, texts, [0] * 6 + [1])
    assert [row.row for row in made.rows] == [0, 3, 2, 5, 6]
    assert made.dropped == {"repeated": 1, "not_drawn": 1}


def test_text_key_folds_form_space_and_case():
    assert text_key(" ﬁne\u00a0 STRASSE\n") == text_key("Fine straße") == "fine strasse"
    assert text_key("a b") != text_key("ab")


def test_too_few_rows_name_the_class_and_the_count():
    with pytest.raises(InputError, match=r"class 'b': expected 2 .* and 1 .*found 2 rows.*2 have"):
        draw([0, 0, 0, 1, 1, 0], [*"abcdef"], [0, 0, 0, 0, 0, 1], shots=2)
    with pytest.raises(InputError, match=r"class 'b'.*found 3 rows .* 2 have a text of their own"):
        draw([0, 0, 0, 1, 1, 1, 0], [*"abc", "d", "D", "e", "f"], [0] * 6 + [1], shots=2)
    with pytest.raises(InputError, match="class 'b': .*found 0 rows"):
        draw([0, 0, 0], [*"abc"], [0, 0, 1])


def test_without_test_rows_it_says_what_to_do():
    with pytest.raises(InputError, match="found 0 in the test split.*holdout"):
        draw([0, 0, 1, 1], [*"abcd"], [0, 0, 0, 0])
    with pytest.raises(InputError, match="found 1 in the test split, of which 1 repeat"):
        draw([0, 0, 1, 1, 0], [*"abcdA"], [0, 0, 0, 0, 1])


ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("aAbBcCdDeEfFgGhHiIjJkK"), st.booleans()),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(
    ROWS,
    st.integers(1, 3),
    st.integers(1, 2),
    st.none() | st.integers(1, 5),
    st.sampled_from(["first", "random"]),
    st.integers(0, 3),
)
def test_laws_of_the_draw(rows, shots, validation, most, how, seed):
    labels = [label for label, *_ in rows]
    texts = [text for _, text, _ in rows]
    is_test = [held for *_, held in rows]
    try:
        made = draw(
            labels, texts, is_test, classes=("a", "b", "c"), shots=shots,
            validation_shots=validation, test_rows=most, draw=how, seed=seed,
        )  # fmt: skip
    except InputError:
        return
    keys = [text_key(texts[row.row]) for row in made.rows]
    assert len(set(keys)) == len(keys)
    assert len(made.rows) + sum(made.dropped.values()) == len(rows)
    assert min(made.dropped.values(), default=1) > 0
    count = Counter((row.part, row.label) for row in made.rows)
    for label in range(3):
        assert count["train", label] == shots and count["validation", label] == validation
    tested = [row for row in made.rows if row.part == "test"]
    assert 1 <= len(tested) <= (most or len(rows))
    for row in made.rows:
        assert is_test[row.row] == (row.part == "test") and labels[row.row] == row.label
    for part, label in count:
        shown = [r.shot for r in made.rows if (r.part, r.label) == (part, label)]
        assert shown == list(range(len(shown)))
    order = ["train", "validation", "test"]
    places = [(order.index(row.part), row.shot, row.label) for row in made.rows]
    assert places == sorted(places)
