"""Streamed rules keep the same rows as the rules in memory, whatever the scores."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pipelines import streamed
from prunery.pipelines.decisions import SCHEMA
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS, prune_scores
from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.sample.ccs import Ccs
from prunery.storage import Store, schemas

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38]),
    st.integers(-3, 3).map(float),
)
FRACTIONS = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.07]), st.floats(0, 1))


@st.composite
def tables(draw):
    """(ids, scores) of up to 60 rows, ids in any order, some sets with few different scores."""
    scores = draw(
        st.lists(draw(st.sampled_from([FLOATS, st.integers(0, 2).map(float)])), max_size=60)
    )
    ids = draw(
        st.lists(
            st.integers(0, 2**63 - 1) if draw(st.booleans()) else st.integers(0, 100),
            min_size=len(scores),
            max_size=len(scores),
            unique=True,
        )
    )
    return np.array(ids, np.int64), np.array(scores, np.float32)


def in_batches(ids, scores, size=7):
    """A factory of batches; the empty batch at the end is on purpose."""
    return lambda: (
        (ids[start : start + size], scores[start : start + size])
        for start in range(0, len(ids) + size, size)
    )


@pytest.fixture(params=["sorted at once", "digit by digit"])
def small_memory(request, monkeypatch):
    """The second time nothing is ever few enough to be sorted, and digits are short."""
    if request.param == "digit by digit":
        monkeypatch.setattr(streamed, "_SORTED", 0)
        monkeypatch.setattr(streamed, "_COUNTERS", 64)


@settings(max_examples=150, deadline=None)
@given(tables(), FRACTIONS)
def check_top(table, keep):
    ids, scores = table
    rule = streamed.top_fraction_streamed(in_batches(ids, scores), keep)
    wanted, border = rules.top_fraction(scores, ids, keep)
    made = rule.decide(ids, scores)
    assert np.array_equal(made.keep, wanted)
    assert rule.rows == len(ids) and rule.kept == wanted.sum()
    assert np.array_equal(rule.threshold, border, equal_nan=True)
    assert np.array_equal(made.score, scores)
    assert made.reason_names() == [streamed.TOP_REASONS[not kept] for kept in wanted]


def test_top_fraction_is_that_in_memory(small_memory):
    check_top()


@settings(max_examples=150, deadline=None)
@given(tables(), FRACTIONS, FRACTIONS, st.integers(1, 70), st.integers(0, 5))
def check_ccs(table, keep, cutoff, strata, seed):
    ids, scores = table
    rule = streamed.ccs_streamed(
        in_batches(ids, scores), keep, cutoff=cutoff, strata=strata, seed=seed
    )
    method = Ccs(keep=keep, cutoff=cutoff, strata=strata)
    wanted = method(Signals({"id": ids, "difficulty": scores}), seed=seed)
    made = rule.decide(ids, scores)
    assert np.array_equal(made.keep, wanted.keep)
    assert np.array_equal(made.reason, wanted.reason) and made.reasons == wanted.reasons
    assert rule.kept == wanted.kept and rule.rows == len(ids)


def test_ccs_is_that_in_memory(small_memory):
    check_ccs()


@pytest.mark.parametrize("kind", ["normal", "constant", "two values", "tiny range"])
def test_many_rows(kind):
    rng = np.random.default_rng(2)
    n = 50_000
    ids = rng.permutation(2**62 // n * np.arange(n))
    scores = {
        "normal": rng.standard_normal(n),
        "constant": np.full(n, -2.5),
        "two values": rng.integers(0, 2, n),
        "tiny range": 1 + 1e-7 * rng.integers(0, 3, n),
    }[kind].astype(np.float32)
    batches = in_batches(ids, scores, 4096)
    for keep in (0.0003, 0.3, 0.97):
        rule = streamed.top_fraction_streamed(batches, keep)
        assert np.array_equal(
            rule.decide(ids, scores).keep, rules.top_fraction(scores, ids, keep)[0]
        )
        made = streamed.ccs_streamed(batches, keep, seed=1).decide(ids, scores)
        by_ccs = Ccs(keep=keep)(Signals({"id": ids, "difficulty": scores}), seed=1)
        assert np.array_equal(made.keep, by_ccs.keep)


def passes(batches):
    count = [0]

    def counted():
        count[0] += 1
        return batches()

    return counted, count


def test_few_passes_are_made():
    rng = np.random.default_rng(0)
    ids, scores = np.arange(40_000), rng.standard_normal(40_000).astype(np.float32)
    batches, count = passes(in_batches(ids, scores, 10_000))
    streamed.top_fraction_streamed(batches, 0.2)
    assert count == [2]
    streamed.ccs_streamed(batches, 0.2, seed=0)
    assert count == [2 + 4]


def test_ties_beyond_what_is_sorted_are_parted_by_id(monkeypatch):
    monkeypatch.setattr(streamed, "_SORTED", 100)
    ids = np.random.default_rng(0).permutation(5000) * 2**40
    batches, count = passes(in_batches(ids, np.zeros(5000, np.float32), 999))
    rule = streamed.top_fraction_streamed(batches, 0.3)
    assert np.array_equal(rule.decide(ids, np.zeros(5000, np.float32)).keep, ids < 1500 * 2**40)
    assert count[0] <= 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_id(bad):
    ids, scores = np.arange(10), np.zeros(10, np.float32)
    scores[6] = bad
    for call in (
        lambda b: streamed.top_fraction_streamed(b, 0.5),
        lambda b: streamed.ccs_streamed(b, 0.5, seed=0),
    ):
        with pytest.raises(InputError, match="row 6 holds"):
            call(in_batches(ids, scores))


def test_options_out_of_range_are_refused():
    none = in_batches(np.zeros(0, np.int64), np.zeros(0, np.float32))
    for call in (
        lambda: streamed.top_fraction_streamed(none, 1.5),
        lambda: streamed.ccs_streamed(none, -0.1, seed=0),
        lambda: streamed.ccs_streamed(none, 0.1, cutoff=2.0, seed=0),
        lambda: streamed.ccs_streamed(none, 0.1, strata=0, seed=0),
    ):
        with pytest.raises(InputError, match="must"):
            call()


# -- the step ------------------------------------------------------------------------------------

SPEC = STEPS["prune_scores"]
SCORED = pa.schema(
    [schemas.id_field(), pa.field("score", pa.float32()), pa.field("t", pa.string())]
)


def write_scores(store, ids, scores, sizes, schema=SCORED):
    """A table of scores with shards of those sizes."""
    columns = {"id": ids, "score": scores, "t": [str(i) for i in ids]}
    rows = pa.table({name: columns[name] for name in schema.names}, schema)
    with store.write(name="scores", step="import_scores", schema=schema) as writer:
        for shard in writer.pending(len(sizes)):
            with writer.shard(shard) as out:
                out.write(rows.slice(sum(sizes[:shard]), sizes[shard]))
        writer.commit()


def run(store, workers=1, seed=0, **options):
    context = StepContext(store, name="kept", seed=seed, workers=workers)
    SPEC(SPEC.options(**options), {"scores": "scores"}, context)
    table = store.table("kept")
    assert table.schema.equals(SCHEMA)
    return table


@pytest.fixture
def scored(tmp_path):
    """(store, ids, scores) in three shards, one of them empty."""
    rng = np.random.default_rng(4)
    ids = rng.permutation(1000)
    scores = np.round(rng.standard_normal(1000), 1).astype(np.float32)
    store = Store(tmp_path / "store")
    write_scores(store, ids, scores, [300, 0, 700])
    return store, ids, scores


@pytest.mark.parametrize("order", ["high", "low"])
def test_the_step_decides_as_the_rule(scored, order):
    store, ids, scores = scored
    table = run(store, keep=0.25, order=order)
    sign = 1 if order == "high" else -1
    wanted, border = rules.top_fraction(sign * scores, ids, 0.25)
    made = table.to_table()
    assert np.array_equal(made["id"], ids)
    assert np.array_equal(made["keep"].to_numpy(), wanted)
    assert np.array_equal(made["score"].to_numpy(), sign * scores), "higher is kept longer"
    assert set(made["threshold"].to_pylist()) == {np.float32(border)}
    assert [part["rows"] for part in table.manifest.parts] == [300, 0, 700]
    assert table.manifest.kept == 250
    assert table.manifest.dropped == {"beyond_fraction": 750}


@pytest.mark.parametrize("order", ["high", "low"])
def test_the_step_decides_as_ccs(scored, order):
    store, ids, scores = scored
    table = run(store, method="ccs", keep=0.3, cutoff=0.2, strata=7, order=order, seed=9)
    difficulty = scores if order == "high" else -scores
    method = Ccs(keep=0.3, cutoff=0.2, strata=7)
    wanted = method(Signals({"id": ids, "difficulty": difficulty}), seed=9)
    made = table.to_table()
    assert np.array_equal(made["keep"].to_numpy(), wanted.keep)
    assert made["reason"].to_pylist() == wanted.reason_names()
    assert made["threshold"].null_count == 1000
    assert table.manifest.dropped == wanted.dropped()


def test_workers_and_resuming_change_nothing(scored, tmp_path, monkeypatch):
    store, ids, scores = scored
    made = run(store, method="ccs", keep=0.4)
    other = Store(tmp_path / "other")
    write_scores(other, ids, scores, [300, 0, 700])
    again = run(other, workers=2, method="ccs", keep=0.4)
    assert again.key == made.key and again.to_table().equals(made.to_table())

    third = Store(tmp_path / "third")
    write_scores(third, ids, scores, [300, 0, 700])
    decided = []
    shard = prune_scores.decided_rows

    def dies_in_the_last(job, index):
        decided.append(index)
        if index == 2 and decided.count(2) == 1:
            raise KeyboardInterrupt
        return shard(job, index)

    monkeypatch.setattr(prune_scores, "decided_rows", dies_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(third, method="ccs", keep=0.4)
    last = run(third, method="ccs", keep=0.4)
    assert decided == [0, 1, 2, 2], "the finished shards are not decided again"
    assert last.to_table().equals(made.to_table())


def test_an_empty_table_is_decided(tmp_path):
    store = Store(tmp_path)
    write_scores(store, np.zeros(0, np.int64), np.zeros(0, np.float32), [0])
    for method in ("top_fraction", "ccs"):
        assert run(store, method=method).num_rows == 0


def test_columns_that_are_no_scores_are_refused(tmp_path):
    store = Store(tmp_path)
    write_scores(store, [1, 2], [0.5, None], [2])
    with pytest.raises(InputError, match="column `score`: row 2 holds no score"):
        run(store)
    with pytest.raises(InputError, match="float32 column among score; found `t` of string"):
        run(store, column="t")
    with pytest.raises(InputError, match="found no column `loss`"):
        run(store, column="loss")


def test_options_of_the_other_method_are_refused():
    for options in ({"cutoff": 0.2}, {"strata": 3}):
        with pytest.raises(ValueError, match="belong to the method ccs"):
            SPEC.options(**options)
