import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.engine import StepContext
from prunery.pipelines.sft_tables import SIGNAL_COLUMNS
from prunery.pipelines.steps.prune_sft import SPEC, PruneSftOptions
from prunery.storage import Store

from .sft_rows import DOMAINS, ENTROPY, IDS, LOSS, tables


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def run(store, inputs, *, seed=0, name="prune", **options):
    context = StepContext(store=store, name=name, seed=seed)
    made = PruneSftOptions.model_validate(options)
    return SPEC(made, inputs, context)


def rows(store, manifest):
    return {row["id"]: row for row in store.table(manifest.key).to_table().to_pylist()}


def test_a_token_method_decides_about_tokens_and_so_about_samples(store):
    keys = tables(store)
    manifest = run(store, {k: keys[k] for k in ("tokens", "signals")}, samples=0.5, tokens=0.5)
    found = rows(store, manifest)
    # Easy and unsure is kept whole; hard and sure loses its highest tokens; the rest goes.
    assert [found[i]["keep"] for i in IDS] == [True, True, False, False]
    assert found[11]["token_keep"] == [True, True]
    assert found[11]["quadrant"] == 4
    assert found[12]["quadrant"] == 2
    assert found[12]["kept_tokens"] == 2
    # Mixed with their neighbours: 229, 233, 279; the end of turn stays.
    assert found[12]["token_keep"] == [True, False, False, True]
    assert [found[i]["tokens"] for i in IDS] == [2, 4, 1, 3]
    assert manifest.kept == 2
    assert sum(manifest.dropped.values()) == 2
    words = manifest.notes["token_reasons"]
    assert [words[code] for code in found[12]["token_reason"]] == [
        "misconception",
        "high_local_perplexity",
        "high_local_perplexity",
        "protected",
    ]
    assert found[11]["reason"] == "calibration"
    assert found[12]["reason"] == "misconception"
    assert found[13]["reason"] == "redundant"
    assert found[14]["reason"] == "noise"
    assert found[13]["token_keep"] == [False]
    assert [found[i]["weight"] for i in IDS] == [1.0, 1.0, 0.0, 0.0]


def test_the_plane_stands_beside_the_decision(store):
    keys = tables(store)
    found = rows(store, run(store, {k: keys[k] for k in ("tokens", "signals")}))
    for id_, loss, entropy in zip(IDS, LOSS, ENTROPY, strict=True):
        assert found[id_]["error"] == pytest.approx(np.mean(loss), rel=1e-6)
        assert found[id_]["uncertainty"] == pytest.approx(np.mean(entropy), rel=1e-6)


def test_a_sample_method_needs_no_signals(store):
    keys = tables(store)
    manifest = run(store, {"tokens": keys["tokens"]}, method="longest", keep=0.5)
    found = rows(store, manifest)
    assert [found[i]["keep"] for i in IDS] == [False, True, False, True]
    assert found[12]["token_keep"] == [True] * 4
    assert found[11]["token_keep"] == [False] * 2
    assert found[12]["token_score"] == []
    assert found[12]["error"] is None
    assert found[12]["weight"] == 1.0
    assert found[11]["weight"] == 0.0
    assert found[11]["threshold"] == 3.0


def test_domains_are_decided_one_by_one(store):
    keys = tables(store)
    inputs = {"tokens": keys["tokens"]}
    plain = rows(store, run(store, inputs, method="longest", keep=0.34))
    apart = rows(store, run(store, inputs, method="longest", keep=0.34, by_domain=True))
    assert not plain[13]["keep"]
    assert apart[13]["keep"], "the only sample of its domain"
    for domain in set(DOMAINS):
        assert any(apart[i]["keep"] for i, d in zip(IDS, DOMAINS, strict=True) if d == domain)
    planes = rows(
        store,
        run(store, {k: keys[k] for k in ("tokens", "signals")}, by_domain=True, samples=0.5),
    )
    assert planes[13]["keep"]
    assert planes[13]["quadrant"] in (2, 4)


def test_a_second_decision_sees_what_the_first_left(store):
    keys = tables(store)
    first = run(store, {"tokens": keys["tokens"]}, method="longest", keep=0.5, name="first")
    inputs = {"tokens": keys["tokens"], "after": first.key}
    second = run(store, inputs, method="random_tokens", tokens=0.5, keep_protected=True)
    found = rows(store, second)
    assert [found[i]["keep"] for i in IDS] == [False, True, False, True]
    assert found[12]["kept_tokens"] == 2
    assert found[14]["kept_tokens"] == 2  # ceil(3 / 2)
    assert found[11]["reason"] == rows(store, first)[11]["reason"]
    assert found[11]["token_reason"] == [len(second.notes["token_reasons"]) - 1] * 2
    # Samples next: a share of the two that are left, tokens as they were.
    inputs["after"] = second.key
    third = rows(store, run(store, inputs, method="random", keep=0.5, name="third"))
    left = [i for i in IDS if third[i]["keep"]]
    assert len(left) == 1
    assert third[left[0]]["token_keep"] == found[left[0]]["token_keep"]


def test_given_scores_come_from_the_rows(store):
    keys = tables(store, raws=[{"s": {"edu": n}} for n in (3, 1, 4, 2)])
    inputs = {"tokens": keys["tokens"], "chats": keys["chats"]}
    given = {"rating": "s.edu"}
    found = rows(store, run(store, inputs, method="qurating", keep=0.5, given=given))
    assert [found[i]["keep"] for i in IDS] == [True, False, True, False]


@pytest.mark.parametrize("bad", [None, "3", True, float("nan")])
def test_a_given_score_must_be_a_number(store, bad):
    keys = tables(store, raws=[{"edu": 1}, {"edu": 2}, {"edu": bad}, {"edu": 3}])
    inputs = {"tokens": keys["tokens"], "chats": keys["chats"]}
    with pytest.raises(InputError, match=r"rows\.jsonl#3, key `edu`"):
        run(store, inputs, method="qurating", given={"rating": "edu"})


def test_trajectories_become_vectors(store):
    extra = SIGNAL_COLUMNS["trajectory"]
    keys = tables(store, extra=extra, loss_trajectory=[[1.0, 2.0]] * 4)
    inputs = {k: keys[k] for k in ("tokens", "signals")}
    assert run(store, inputs, method="s2l", keep=0.5).kept == 2
    keys = tables(store, extra=extra, loss_trajectory=[[1.0], [1.0, 2.0], [1.0], [1.0]])
    inputs = {k: keys[k] for k in ("tokens", "signals")}
    with pytest.raises(InputError, match="as many values in every row"):
        run(store, inputs, method="s2l", keep=0.5)


def test_missing_signals_are_named_before_anything_runs(store):
    keys = tables(store)
    inputs = {k: keys[k] for k in ("tokens", "signals")}
    with pytest.raises(RecipeError, match="history_loss, prompt_attention"):
        run(store, inputs, method="sstoken")
    with pytest.raises(RecipeError, match="embedding"):
        run(store, inputs, method="k_center")
    with pytest.raises(RecipeError, match="needs the input `chats`"):
        run(store, inputs, method="qurating", given={"rating": "x"})
    with pytest.raises(ValueError, match="unknown signal `ratings`"):
        PruneSftOptions.model_validate({"method": "qurating", "given": {"ratings": "x"}})


@pytest.mark.parametrize("method", ["random_tokens", "excess_loss"])
def test_shards_do_not_matter(store, method):
    extra = SIGNAL_COLUMNS["reference"]
    losses = [[0.3 * (i + j) for j in range(len(loss))] for i, loss in enumerate(LOSS)]
    made = []
    for shards in (1, 3):
        keys = tables(store, shards=shards, extra=extra, reference_loss=losses)
        inputs = {k: keys[k] for k in ("tokens", "signals")}
        made.append(rows(store, run(store, inputs, method=method, tokens=0.5)))
    assert made[0] == made[1]


def test_an_empty_set_is_decided_too(store):
    from prunery.pipelines.sft_tables import TOKENS

    from .sft_rows import write

    key = write(store, "none", "tokenize_chats", TOKENS, [[]])
    assert run(store, {"tokens": key}, method="random_tokens").rows == 0
    assert run(store, {"tokens": key}, method="random").rows == 0


def test_totals_count_samples_and_tokens(store):
    from prunery.pipelines.run import RunResult

    keys = tables(store)
    manifest = run(store, {"tokens": keys["tokens"]}, method="longest", keep=0.5)
    result = RunResult("r", store, {"prune": manifest})
    assert result.selections() == {
        "prune": {"samples": 4, "samples_kept": 2, "tokens": 10, "tokens_kept": 7}
    }
    assert "prune: 4 -> 2 samples, 10 -> 7 trained tokens (30% removed)" in result.lines()


def test_the_decision_schema_is_kept(store):
    from prunery.pipelines.sft_tables import DECISION

    keys = tables(store)
    table = store.table(run(store, {"tokens": keys["tokens"]}, method="random").key)
    assert pa.schema(table.schema).equals(DECISION)
