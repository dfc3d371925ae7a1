import numpy as np
import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.compression.calibration import (
    Sources,
    TokenRow,
    order_of,
    packed_rows,
    part_of,
    single_rows,
)
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import DECISION, TOKENS
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from ..sft_rows import write


def sources(n=200, domains="abbb", score=False):
    rng = np.random.default_rng(0)
    ids = rng.permutation(10_000)[:n].astype(np.int64)
    named = np.array([domains[i % len(domains)] for i in range(n)], object)
    return Sources(ids, named, rng.normal(size=n).astype(np.float32) if score else None)


def token_rows(lengths):
    for number, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int64) + 1000 * number
        yield TokenRow(number, str(number), None, ids, ids)


@pytest.mark.parametrize("choice", ["random", "stratified", "balanced", "highest", "lowest"])
def test_an_order_does_not_depend_on_the_order_of_rows(choice):
    given = sources(score=True)
    shuffle = np.random.default_rng(1).permutation(200)
    plain = given.ids[order_of(given, choice, 3)]
    other = given.take(shuffle)
    assert np.array_equal(plain, other.ids[order_of(other, choice, 3)])
    assert sorted(plain) == sorted(given.ids)
    if choice in ("random", "stratified", "balanced"):
        assert not np.array_equal(plain, given.ids[order_of(given, choice, 4)])


def test_strata_are_in_proportion_and_balance_is_even():
    given = sources()
    some = given.domains[order_of(given, "stratified", 0)[:80]]
    assert abs((some == "a").sum() - 20) <= 1
    even = given.domains[order_of(given, "balanced", 0)[:80]]
    assert abs((even == "a").sum() - 40) <= 1


def test_highest_is_by_score_and_needs_one():
    given = sources(score=True)
    assert (np.diff(given.score[order_of(given, "highest", 0)]) <= 0).all()
    with pytest.raises(InputError, match="needs a score"):
        order_of(sources(), "highest", 0)


def test_no_row_is_in_both_parts():
    given = sources(2000)
    one = part_of(given, "calibration", 0.1, 0).ids
    other = part_of(given, "evaluation", 0.1, 0).ids
    assert sorted([*one, *other]) == sorted(given.ids) and not set(one) & set(other)
    assert 120 < len(other) < 280
    # and the choice of calibration rows is not bent by the split
    assert abs(np.mean(given.ids) - np.mean(one)) < 300


def test_windows_are_the_rows_laid_end_to_end():
    lengths = [5, 0, 1, 12, 3, 30, 2]
    made = packed_rows(token_rows(lengths), 6, 8)
    flat = np.concatenate([row.input_ids for row in token_rows(lengths)])
    assert len(made) == 6
    assert np.array_equal(np.concatenate([w.input_ids for w in made]), flat[:48])
    for window in made:
        assert len(window.input_ids) == 8
        assert set(window.input_ids // 1000) == set(window.sources)
        assert window.domain == str(window.input_ids[0] // 1000)


def test_single_rows_are_cut_and_short_ones_passed_over():
    made = single_rows(token_rows([5, 1, 12, 3]), 3, 4, 2)
    assert [row.id for row in made] == [0, 2, 3]
    assert [len(row.input_ids) for row in made] == [4, 4, 3]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def samples(store, count=40):
    rows = [
        {
            "id": i,
            "domain": "ab"[i % 2],
            "input_ids": [i] * (4 + i % 5),
            "trainable": [False, False, *[True] * (2 + i % 5)],
            "turn": [0] * (4 + i % 5),
            "protected": [False] * (4 + i % 5),
            "truncated": False,
        }
        for i in range(count)
    ]
    return write(store, "tokens", "tokenize_chats", TOKENS, [rows[:15], rows[15:]])


def run(store, inputs, seed=0, **options):
    spec = STEPS["calibration_rows"]
    made = spec(spec.options(**options), inputs, StepContext(store, name="rows", seed=seed))
    return store.table(made.key).to_table().to_pylist()


def test_rows_carry_labels_and_where_they_come_from(store):
    made = run(store, {"tokens": samples(store)}, rows=5, length=6, pack=False)
    assert len(made) == 5
    for row in made:
        (source,) = row["sources"]
        assert row["input_ids"] == [source] * len(row["input_ids"])
        assert row["labels"][:2] == [-100, -100] and set(row["labels"][2:]) == {source}


def test_a_decision_leaves_its_rows_and_tokens_out(store):
    key = samples(store)
    decided = [
        {
            "id": i,
            "keep": i % 4 == 0,
            "score": 0.0,
            "reason": "",
            "threshold": None,
            "rival": None,
            "weight": 1.0,
            "tokens": 2 + i % 5,
            "kept_tokens": 1,
            "token_keep": [True] + [False] * (1 + i % 5),
            "token_score": [],
            "token_reason": [],
            "error": None,
            "uncertainty": None,
            "quadrant": None,
            "topped_up": None,
        }
        for i in range(40)
    ]
    decision = write(store, "decision", "prune_sft", DECISION, [decided])
    made = run(store, {"tokens": key, "decision": decision}, rows=10, length=20, pack=False)
    assert sorted(row["sources"][0] for row in made) == list(range(0, 40, 4))
    assert all(sum(label != -100 for label in row["labels"]) == 1 for row in made)


def test_domains_and_seeds(store):
    key = samples(store)
    made = run(store, {"tokens": key}, rows=4, length=20, pack=False, domains=["b"])
    assert all(row["domain"] == "b" for row in made)
    again = run(store, {"tokens": key}, rows=4, length=20, pack=False, domains=["b"], seed=1)
    assert {r["sources"][0] for r in made} != {r["sources"][0] for r in again}


def test_too_few_rows_are_refused_with_what_there_is(store):
    with pytest.raises(InputError, match=r"expected 99 rows of 8 tokens; found \d+ in the 40"):
        run(store, {"tokens": samples(store)}, rows=99, length=8)
    with pytest.raises(InputError, match="found 0"):
        run(store, {"tokens": samples(store)}, rows=1, length=100, shortest=50, pack=False)


def test_an_input_too_many_or_too_few_is_refused(store):
    with pytest.raises(RecipeError, match="one of the inputs"):
        run(store, {})
    with pytest.raises(RecipeError, match="together"):
        run(store, {"tokens": samples(store)}, score="loss", rows=1)
