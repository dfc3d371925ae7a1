"""Students of kept rows: the grid of cells, the choice of a weight, and what comes out."""

import numpy as np
import pytest
from pydantic import ValidationError

from prunery.errors import InputError, RecipeError
from prunery.pipelines.alpha import POINTS
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pipelines.students import (
    Score,
    StudentOptions,
    classroom,
    decision_inputs,
    decision_options,
    held_out,
    sweep_alpha,
    worst_class,
)
from prunery.storage import Store

from .labelled_rows import dynamics, labelled, teacher

SMALL = {"fractions": [0.3, 0.6], "steps": 30, "batch_size": 16, "hidden": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("students") / "store")


@pytest.fixture(scope="module")
def tables(store):
    data, rows = labelled(store, flip=tuple(range(0, 60, 6)))
    keys = {"data": data, "dynamics": dynamics(store, data, rows)}
    decision = run(store, keys, step="prune_dataset", method="aum", keep=0.5)
    return {"data": data, "decision": decision.key, "teacher": teacher(store, data, rows)}


def run(store, inputs, *, step, seed=0, workers=1, **options):
    spec = STEPS[step]
    made = spec.options.model_validate(options)
    context = StepContext(store=store, name=step, seed=seed, workers=workers, threads=1)
    return spec(made, inputs, context)


def rows(store, manifest):
    return store.table(manifest.key).to_table().to_pylist()


def test_the_grid_is_whole_at_equal_steps(store, tables):
    manifest = run(store, tables, step="distil", alpha=0.5, seeds=2, **SMALL)
    found = rows(store, manifest)
    cells = {(r["selection"], round(r["fraction"], 3), r["distilled"], r["seed"]) for r in found}
    lines = [(s, f) for s in ("random", "chosen") for f in (0.3, 0.6)] + [("full", 1.0)]
    assert cells == {(s, f, d, seed) for s, f in lines for d in (False, True) for seed in (0, 1)}
    assert {r["steps"] for r in found} == {30}
    assert {r["alpha"] for r in found if r["distilled"]} == {0.5}
    assert {r["alpha"] for r in found if not r["distilled"]} == {0.0}
    assert {(round(r["fraction"], 3), r["rows"]) for r in found} == {
        (0.3, 18),
        (0.6, 36),
        (1.0, 60),
    }
    assert all(0 <= r["worst_class_accuracy"] <= r["accuracy"] <= 1 for r in found)
    # Three far centres, and the chosen rows hold no wrong label.
    clean = [r["accuracy"] for r in found if r["selection"] == "chosen"]
    assert min(clean) > 0.9


def test_workers_and_a_rerun_change_nothing(store, tables, tmp_path):
    options = {"step": "distil", "alpha": 1.0, "seeds": 1, **SMALL}
    first = run(store, tables, **options)
    assert run(store, tables, **options).created == first.created
    other = Store(tmp_path / "other")
    data, made = labelled(other, flip=tuple(range(0, 60, 6)))
    keys = {"data": data, "dynamics": dynamics(other, data, made)}
    decision = run(other, keys, step="prune_dataset", method="aum", keep=0.5)
    inputs = {"data": data, "decision": decision.key, "teacher": teacher(other, data, made)}
    assert run(other, inputs, workers=2, **options).logical_digest == first.logical_digest


def test_a_teacher_who_knows_mends_wrong_labels(store, tables):
    manifest = run(store, tables, step="distil", alpha=1.0, seeds=3, **{**SMALL, "steps": 120})
    found = rows(store, manifest)
    full = {d: np.mean([r["accuracy"] for r in found
                        if r["selection"] == "full" and r["distilled"] == d])
            for d in (False, True)}  # fmt: skip
    assert full[True] == 1.0
    assert full[False] < 1.0


def test_a_sweep_chooses_one_weight_a_line_and_students_take_it(store, tables):
    swept = run(store, tables, step="sweep_alpha", seeds=2, **SMALL)
    found = rows(store, swept)
    lines = {(r["selection"], round(r["fraction"], 3)) for r in found}
    assert len(lines) == 5
    used = {}
    for line in lines:
        mine = [r for r in found if (r["selection"], round(r["fraction"], 3)) == line]
        assert sorted((r["alpha"], r["seed"]) for r in mine) == [
            (a, s) for a in POINTS for s in (0, 1)
        ]
        chosen = {r["alpha"] for r in mine if r["used"]}
        assert len(chosen) == 1
        used[line] = chosen.pop()
    students = run(store, {**tables, "alphas": swept.key}, step="distil", seeds=1, **SMALL)
    for row in rows(store, students):
        if row["distilled"]:
            assert row["alpha"] == used[row["selection"], round(row["fraction"], 3)]


@pytest.mark.parametrize(("fewest", "share"), [(2, 0.5), (1000, 0.5)])
def test_rows_of_doubtful_labels_do_not_choose_the_weight(
    store, tables, monkeypatch, fewest, share
):
    """Judged by wrong labels, a student who repeats them would win; too few rows choose nothing."""
    decision = store.table(tables["decision"])
    inputs = decision_inputs(store, decision)
    room = classroom(decision_options(decision), inputs, store.table(tables["teacher"]))
    assert set(room.rows.ids[room.doubted]) == set(room.rows.ids[room.rows.flipped])
    judges = []

    def judge(options, examples, teacher, judged, *, alpha, seed, steps):
        judges.append(judged)
        return Score(1.0 - alpha, 0.0)

    monkeypatch.setattr("prunery.pipelines.students.train_and_score", judge)
    monkeypatch.setattr("prunery.pipelines.students._FEWEST_JUDGED", fewest)
    options = StudentOptions(fractions=[0.3])
    found = sweep_alpha(room, options, "full", 1.0, share=share, steps=1, seeds=[0])
    wrong = set(room.rows.ids[room.doubted])
    assert len(judges) == len(POINTS)
    if fewest == 2:
        assert 2 <= len(judges[0]) < 30
        assert not wrong & set(judges[0].ids)
        assert found.used == 0.0
    else:
        assert len(judges[0]) == 30
        # The prior of full data is 0.375: of 0.25 and 0.5 the lower.
        assert found.used == 0.25


def test_auto_without_a_sweep_or_of_other_fractions_is_refused(store, tables):
    with pytest.raises(RecipeError, match="an input `alphas`, or a number"):
        run(store, tables, step="distil", **SMALL)
    swept = run(store, tables, step="sweep_alpha", **{**SMALL, "fractions": [0.3]})
    with pytest.raises(RecipeError, match="no weight for random rows at a fraction of 0.6"):
        run(store, {**tables, "alphas": swept.key}, step="distil", **SMALL)
    with pytest.raises(RecipeError, match="`alpha` lies in"):
        run(store, tables, step="distil", **SMALL, alpha=1.5)


@pytest.mark.parametrize("fractions", [[], [0.0], [1.0], [0.5, 0.5], [float("nan")]])
def test_fractions_out_of_range_are_refused(fractions):
    with pytest.raises(ValidationError, match="fractions"):
        STEPS["distil"].options.model_validate({"fractions": fractions})


def test_students_need_a_test_split_and_the_decisions_data(store, tables):
    data, made = labelled(store, test=0, seed=5)
    decision = run(store, {"data": data}, step="prune_dataset", method="random", keep=0.5)
    inputs = {"data": data, "decision": decision.key, "teacher": teacher(store, data, made)}
    with pytest.raises(InputError, match="no row in the split `test`"):
        run(store, inputs, step="distil", alpha=0.0, **SMALL)
    with pytest.raises(InputError, match="decided about"):
        run(store, {**inputs, "data": tables["data"]}, step="distil", alpha=0.0, **SMALL)


def test_a_threshold_has_no_fractions(store, tables):
    data, made = labelled(store, seed=6)
    taught = teacher(store, data, made)
    keys = {"data": data, "vectors": taught}
    decision = run(store, keys, step="prune_dataset", method="near_duplicate", distance=0.0)
    inputs = {"data": data, "decision": decision.key, "teacher": taught}
    with pytest.raises(RecipeError, match="keeps what is above a threshold"):
        run(store, inputs, step="distil", alpha=0.0, **SMALL)


def test_held_out_rows_are_a_part_of_their_own(store, tables):
    from prunery.pipelines.classifier import load_examples

    examples = load_examples(store.table(tables["data"])).of_split("train")
    log_p = np.arange(60, dtype=np.float32)[:, None].repeat(3, axis=1)
    train, taught, judged = held_out(examples, log_p, share=0.25, seed=0)
    assert (len(train), len(judged)) == (45, 15)
    assert not set(train.ids) & set(judged.ids)
    assert examples.ids[taught[:, 0].astype(int)].tolist() == train.ids.tolist()
    one, _, same = held_out(examples.take([4]), log_p[4:5], share=0.25, seed=0)
    assert one.ids.tolist() == same.ids.tolist()
    _, _, single = held_out(examples.take([1, 2]), log_p[1:3], share=0.01, seed=0)
    assert len(single) == 1


def test_the_worst_class_is_the_lowest_of_those_that_are_there():
    label = np.array([0, 0, 0, 2, 2])
    right = np.array([True, True, False, True, False])
    assert worst_class(right, label) == 0.5
