import numpy as np
import pytest

from prunery.errors import BudgetError, InputError, PruneryWarning, RecipeError
from prunery.pipelines.dataset_decide import DecideOptions
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from .labelled_rows import dynamics, labelled, ring, teacher

FLIP = (3, 10, 17, 24, 31, 38)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("prune_dataset") / "store")


@pytest.fixture(scope="module")
def tables(store):
    data, rows = labelled(store, flip=FLIP, group=lambda row: "rare" if row < 4 else "common")
    keys = {"data": data, "dynamics": dynamics(store, data, rows, runs=2)}
    keys |= {"vectors": teacher(store, data, rows), "neighbours": ring(store, data, rows)}
    return keys, rows


def run(store, inputs, *, seed=0, step="prune_dataset", **options):
    spec = STEPS[step]
    made = spec.options.model_validate(options)
    return spec(made, inputs, StepContext(store=store, name=step, seed=seed))


def kept(store, manifest):
    rows = store.table(manifest.key).to_table().to_pylist()
    return {row["id"] for row in rows if row["keep"]}


def of(rows, numbers):
    return {rows[i]["id"] for i in numbers}


def test_training_rows_are_decided_and_test_rows_are_not(store, tables):
    keys, rows = tables
    manifest = run(store, keys, method="aum", keep=0.9)
    table = store.table(manifest.key).to_table()
    assert table.column("id").to_pylist() == [r["id"] for r in rows if r["split"] == "train"]
    assert manifest.kept == 54
    # The flipped rows have the lowest margins over training: they are the tenth that goes.
    assert kept(store, manifest).isdisjoint(of(rows, FLIP))
    assert manifest.dropped == {"hard": 6}


def test_runs_of_the_table_reach_the_method(store, tables):
    keys, _ = tables
    # Two runs of four epochs: taken for one run of eight, every row would be forgotten once.
    manifest = run(store, keys, method="forgetting", keep=0.1)
    scores = store.table(manifest.key).to_table().column("score").to_numpy()
    assert set(scores.tolist()) == {0.0}
    assert "runs" not in manifest.options["options"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ccs", "difficulty": "el2n"},
        {"method": "d2", "difficulty": "aum"},
        {"method": "herding"},
        {"method": "moderate"},
        {"method": "tdds"},
        {"method": "infobatch"},
        {"method": "s2l"},
        {"method": "random"},
        {"method": "stratified_random"},
    ],
)
def test_every_kind_of_signal_finds_its_way(store, tables, options):
    keys, _ = tables
    manifest = run(store, keys, **options)
    assert 0 < manifest.kept < 60


def test_infobatch_looks_at_the_loss_of_the_last_epoch(store, tables):
    keys, rows = tables
    manifest = run(store, keys, method="infobatch")
    found = {row["id"]: row for row in store.table(manifest.key).to_table().to_pylist()}
    # By then the flipped rows are learned, and the losses fall from the first row to the last.
    hard = [found[rows[i]["id"]]["reason"] == "hard" for i in range(60)]
    assert hard == sorted(hard, reverse=True)
    assert 0 < sum(hard) < 38


def test_a_group_keeps_its_floor(store, tables):
    keys, rows = tables
    manifest = run(store, keys, method="aum", keep=0.1, floor=1.0, balance="group")
    assert len(kept(store, manifest) & of(rows, range(4))) == 1


def test_classes_left_empty_are_named(store, tables):
    keys, _ = tables
    with pytest.warns(PruneryWarning, match="leaves no row of the classes"):
        run(store, keys, method="random", keep=0.02)
    manifest = run(store, keys, method="random", keep=0.05, floor=0.1)
    assert manifest.kept == 3
    with pytest.raises(BudgetError, match="3 groups, and the budget is 2 rows"):
        run(store, keys, method="random", keep=0.02, floor=0.1)


def test_a_decision_goes_on_where_another_stopped(store, tables):
    keys, _ = tables
    first = run(store, keys, method="aum", keep=0.9)
    second = run(store, {**keys, "after": first.key}, method="el2n", keep=0.5)
    assert second.kept == 27
    assert second.dropped["dropped_before"] == 6
    assert kept(store, second) < kept(store, first)


def test_what_is_missing_is_named_with_the_step_that_makes_it(store, tables):
    keys, _ = tables
    data = {"data": keys["data"]}
    with pytest.raises(RecipeError, match="`margin`.*input `dynamics`.*train_classifier"):
        run(store, data, method="aum")
    with pytest.raises(RecipeError, match="`embedding`.*teacher_outputs or embed"):
        run(store, data, method="herding")
    with pytest.raises(RecipeError, match="gradient_norm: last_layer"):
        run(store, keys, method="grand")
    with pytest.raises(RecipeError, match="`memorisation`.*import_scores"):
        run(store, keys, method="ccs", difficulty="memorisation")


def test_a_short_run_warns_where_it_matters(store, tables):
    keys, _ = tables
    with pytest.warns(PruneryWarning, match="long enough to memorise; `epochs` is 4"):
        run(store, keys, method="dyn_unc")
    with pytest.warns(PruneryWarning, match="long enough to memorise"):
        run(store, keys, method="ccs", difficulty="dyn_unc")


def test_only_what_changes_rows_enters_the_key(store, tables):
    keys, _ = tables
    one = run(store, keys, method="aum", keep=0.5)
    assert run(store, keys, method="aum", keep=0.5, difficulty="el2n").key == one.key
    assert run(store, keys, method="aum", keep=0.4).key != one.key
    assert run(store, keys, method="aum", keep=0.5, by="class").key != one.key
    assert run(store, keys, method="aum", keep=0.5, floor=0.5).key != one.key


def test_no_training_row_is_refused(store):
    data, _ = labelled(store, train=0, test=6)
    with pytest.raises(InputError, match="no row in the split `train`"):
        run(store, {"data": data}, method="random")


def test_one_class_alone_is_pruned_like_any(store):
    data, _ = labelled(store, classes=["all"], seed=3)
    assert run(store, {"data": data}, method="random", keep=0.5, floor=0.5).kept == 30


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    store = Store(tmp_path / "store")
    data, rows = labelled(store)
    rows[5]["features"] = [float("nan")] * 4
    vectors = teacher(store, data, rows)
    with pytest.raises(InputError, match="`embedding` must be finite"):
        run(store, {"data": data, "vectors": vectors}, method="herding")


# -- imported scores and found noise ------------------------------------------------------------


def scores_csv(tmp_path, rows, values, *, column="mem"):
    path = tmp_path / "scores.csv"
    lines = [f"source,{column}"] + [
        f"{row['source']},{value}" for row, value in zip(rows, values, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_scores_of_a_file_decide(store, tables, tmp_path):
    keys, rows = tables
    train = [row for row in rows if row["split"] == "train"]
    backwards = [*reversed(list(zip(train, np.linspace(0, 1, 60), strict=True)))]
    path = scores_csv(tmp_path, [row for row, _ in backwards], [v for _, v in backwards])
    given = run(
        store, {"data": keys["data"]}, step="import_scores", path=path,
        columns={"memorisation": "mem"},
    )  # fmt: skip
    found = store.table(given.key).to_table()
    np.testing.assert_allclose(found.column("memorisation").to_numpy(), np.linspace(0, 1, 60))
    inputs = {**keys, "given": given.key}
    hard = run(store, inputs, method="memorisation", keep=0.1)
    assert kept(store, hard) == of(rows, range(54, 60))
    assert run(store, inputs, method="ccs", difficulty="memorisation").kept == 30


def test_scores_in_order_come_from_arrays(store, tables, tmp_path):
    keys, _ = tables
    path = tmp_path / "scores.npz"
    np.savez(path, mem=np.arange(60) / 60, infl=np.ones((2, 2)))
    manifest = run(
        store, {"data": keys["data"]}, step="import_scores", path=str(path), key="order",
        columns={"memorisation": "mem"},
    )  # fmt: skip
    found = store.table(manifest.key).to_table().column("memorisation").to_numpy()
    np.testing.assert_allclose(found, np.arange(60) / 60, rtol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t[:-1], "a line for each of 60 training rows; 1"),
        (lambda t: [*t, t[0]], "every source once; 1 lines repeat one"),
        (lambda t: [(r, "" if i == 4 else v) for i, (r, v) in enumerate(t)], "line 5 holds nan"),
    ],
)
def test_bad_scores_are_refused(store, tables, tmp_path, spoil, words):
    keys, rows = tables
    lines = spoil([(row, 0.5) for row in rows if row["split"] == "train"])
    path = scores_csv(tmp_path, [row for row, _ in lines], [value for _, value in lines])
    with pytest.raises(InputError, match=words):
        run(
            store, {"data": keys["data"]}, step="import_scores", path=path,
            columns={"memorisation": "mem"},
        )  # fmt: skip


def test_a_column_that_is_not_there_is_named(store, tables, tmp_path):
    keys, rows = tables
    path = scores_csv(tmp_path, rows, [0.5] * len(rows), column="other")
    with pytest.raises(InputError, match="a column `mem`, found other, source"):
        run(
            store, {"data": keys["data"]}, step="import_scores", path=path,
            columns={"memorisation": "mem"},
        )  # fmt: skip


def test_flipped_labels_are_found_by_margin(store, tables):
    keys, _ = tables
    manifest = run(store, keys, step="noise_found")
    found = {row["score"]: row for row in store.table(manifest.key).to_table().to_pylist()}
    assert {"el2n", "forgetting", "aum", "loss"} <= set(found)
    assert "grand" not in found and "shapley" not in found
    assert found["aum"]["planted"] == 6
    assert found["aum"]["found"] == 6
    assert found["aum"]["auc"] == 1.0


def test_without_planted_noise_there_is_nothing_to_find(store):
    data, rows = labelled(store, seed=9)
    inputs = {"data": data, "dynamics": dynamics(store, data, rows)}
    assert run(store, inputs, step="noise_found").rows == 0


def test_options_of_a_decision_come_back_from_its_manifest(store, tables):
    from prunery.pipelines.students import decision_inputs, decision_options

    keys, _ = tables
    manifest = run(
        store, keys, method="ccs", difficulty="el2n", cutoff=0.2, by="class", floor=0.25,
        balance="group", keep=0.4,
    )  # fmt: skip
    table = store.table(manifest.key)
    made = decision_options(table)
    assert isinstance(made, DecideOptions)
    assert made.identity() == {k: v for k, v in manifest.options.items() if k != "inputs"}
    assert {role: t.key for role, t in decision_inputs(store, table).items()} == keys
