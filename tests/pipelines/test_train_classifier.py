"""The steps: dynamics and weights of a training, killed and taken up; the teacher's outputs."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prunery.errors import InputError, ModelError, RecipeError
from prunery.pipelines import classifier_state
from prunery.pipelines.classifier import (
    Trainer,
    classifier_from_table,
    load_examples,
    predict,
    runs_of,
)
from prunery.pipelines.classifier_state import load_state, save_state, state_file
from prunery.pipelines.dynamics import gradient_norms, log_probabilities, measures, trajectories
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pipelines.steps.teacher_outputs import mean_log_probability, unit_rows
from prunery.storage import Store, schemas

from . import classifier_driver
from .classifier_rows import pictures, png, points, rows_of, write, write_data, write_points
from .reused_rows import same_rows

SMALL = {"hidden": 16, "depth": 1, "epochs": 3, "batch_size": 8}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def run(store, name, inputs, *, as_=None, seed=0, **options):
    step = STEPS[name]
    context = StepContext(store, as_ or name, threads=1, seed=seed)
    return step(step.options(**options), inputs, context)


def train(store, **options):
    return run(store, "train_classifier", {"data": "data"}, as_="dyn", **{**SMALL, **options})


def weights_of(manifest):
    return [a["sha256"] for a in manifest.attachments if a["name"].startswith("weights")]


# -- training ----------------------------------------------------------------------------------


def test_the_table_holds_an_epoch_a_shard_and_the_final_weights(store):
    write_points(store)
    manifest = train(store, runs=2, gradient_norm="last_layer", keep_logits=True)
    table = store.table("dyn")
    assert table.shards() == list(range(6))
    assert manifest.rows == manifest.kept == 6 * 24
    rows = load_examples(store.table("data")).of_split("train")
    found, runs = trajectories(table, ["margin", "gradient_norm", "probability_change"], rows.ids)
    assert runs == runs_of(table) == 2
    assert not np.allclose(found["margin"][:, 2], found["margin"][:, 5])  # other weights and order
    for number in range(2):
        model = classifier_from_table(table, number)
        logits, _ = predict(model, rows.x)
        last = (number + 1) * 3 - 1
        np.testing.assert_allclose(
            found["margin"][:, last], measures(logits, rows.label)["margin"], rtol=1e-5, atol=1e-5
        )
        norms = gradient_norms(model, rows.x, rows.label)
        np.testing.assert_allclose(found["gradient_norm"][:, last], norms, rtol=1e-4, atol=1e-6)
        stored = next(table.shard_batches(last, ["logits"])).column("logits").to_pylist()
        np.testing.assert_allclose(np.float32(stored), logits, atol=1e-5)
    assert manifest.notes["classes"] == ["a", "b", "c"]
    assert manifest.options["gradient_norm"] == "last_layer"
    with pytest.raises(RecipeError, match="from 0 to 1; found 2"):
        classifier_from_table(table, 2)
    assert not state_file(manifest.key, 0).exists()


def test_it_trains_on_the_train_split_alone_and_learns_it(store):
    key, rows = write_points(store, 60, train=45)
    train(store, epochs=8)
    table = store.table("dyn")
    found = trajectories(table, ["correct"], [r["id"] for r in rows if r["split"] == "train"])[0]
    assert found["correct"][:, -1].mean() > 0.95
    samples = set(table.to_table(["sample"]).column("sample").to_pylist())
    assert samples == {row["id"] for row in rows if row["split"] == "train"}
    held = load_examples(store.table(key)).of_split("test")
    logits, _ = predict(classifier_from_table(table), held.x)
    assert (logits.argmax(axis=1) == held.label).mean() > 0.9


def test_the_seed_and_every_option_that_changes_rows_are_in_the_key(store):
    write_points(store)
    first = train(store)
    assert train(store, device="cpu").key == first.key
    others = [
        train(store, seed=1),
        train(store, learning_rate=0.01),
        train(store, keep_logits=True),
    ]
    assert len({first.key, *(other.key for other in others)}) == 4
    assert others[0].logical_digest != first.logical_digest


def test_all_parameters_gradient_norms_are_recorded(store):
    write_points(store)
    train(store, gradient_norm="all")
    rows = load_examples(store.table("data")).of_split("train")
    found = trajectories(store.table("dyn"), ["gradient_norm"], rows.ids)[0]["gradient_norm"]
    model = classifier_from_table(store.table("dyn"))
    wanted = gradient_norms(model, rows.x, rows.label, "all")
    np.testing.assert_allclose(found[:, -1], wanted, rtol=1e-4, atol=1e-6)
    assert (found[:, -1] > gradient_norms(model, rows.x, rows.label)).all()


# -- killed and taken up -----------------------------------------------------------------------


def write_pictures(store, n=20):
    pixels, label = pictures(n, size=16)
    rows = rows_of("image", n, train=n, contents=[png(picture) for picture in pixels], label=label)
    write_data(store, rows, kind="image", shape=[1, 16, 16])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The manifest of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = os.environ.get("PRUNERY_CACHE")
    os.environ["PRUNERY_CACHE"] = str(folder / "cache")
    try:
        write_pictures(Store(folder / "store"))
        return classifier_driver.train(Store(folder / "store"))
    finally:
        os.environ.pop("PRUNERY_CACHE")
        if before is not None:
            os.environ["PRUNERY_CACHE"] = before


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A function that gives the folder of a training killed at a moment."""
    made = {}

    def at(moment):
        if moment not in made:
            folder = made[moment] = tmp_path_factory.mktemp("killed")
            write_pictures(Store(folder / "store"))
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tests.pipelines.classifier_driver",
                    folder / "store",
                    moment,
                ],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "PRUNERY_CACHE": str(folder / "cache")},
                timeout=120,
                check=False,
                capture_output=True,
            )
            assert done.returncode == -signal.SIGKILL, done.stderr
        return made[moment]

    return at


# 3 steps an epoch, 4 epochs a run, 2 runs.
@pytest.mark.parametrize(
    ("moment", "shards", "lost", "left"),
    [
        ("state:2", 3, False, 24 - 6),  # an epoch is written, its state is not
        ("step:17", 5, False, 24 - 15),  # within an epoch of the second run
        ("step:17", 5, True, 24),  # and the states are gone
    ],
)
def test_a_killed_training_goes_on_to_the_same_rows(
    tmp_path, killed, undisturbed, monkeypatch, moment, shards, lost, left
):
    shutil.copytree(killed(moment), tmp_path, dirs_exist_ok=True)
    store = Store(tmp_path / "store")
    assert "dyn" not in store.names()
    assert len(list((tmp_path / "store").rglob("part-*.parquet"))) == shards + 1  # and the data
    if lost:
        shutil.rmtree(tmp_path / "cache")
    steps = []
    original = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self: steps.append(None) or original(self))
    made = classifier_driver.train(store)
    assert len(steps) == left
    assert made.key == undisturbed.key
    assert made.logical_digest == undisturbed.logical_digest
    assert weights_of(made) == weights_of(undisturbed)
    assert not state_file(made.key, 0).parent.exists()


def test_the_state_of_another_store_leaves_no_gap(tmp_path, killed, undisturbed):
    """The key is the same in every store, so the cache may hold the state of another one."""
    shutil.copytree(killed("step:17") / "cache", tmp_path / "cache")
    write_pictures(Store(tmp_path / "store"))
    made = classifier_driver.train(Store(tmp_path / "store"))
    assert made.logical_digest == undisturbed.logical_digest


def test_a_damaged_state_is_as_good_as_none(tmp_path):
    path = tmp_path / "a" / "run-0.safetensors"
    assert load_state(path) is None
    save_state(path, {"x": torch.arange(3.0), "step": torch.tensor([4])})
    assert load_state(path)["x"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-4])
    assert load_state(path) is None
    save_state(path, {"x": torch.ones(1)})
    assert [p.name for p in path.parent.iterdir()] == ["run-0.safetensors"]


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run-0.safetensors"
    save_state(path, {"x": torch.ones(1)})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(classifier_state.os, "replace", full)
    with pytest.raises(OSError, match="space"):
        save_state(path, {"x": torch.zeros(1)})
    assert load_state(path)["x"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["run-0.safetensors"]


# -- the teacher -------------------------------------------------------------------------------


def test_outputs_follow_the_datas_shards_for_all_splits(store):
    key, _ = write_points(store, 36, train=24, shards=3)
    train(store, runs=2)
    manifest = run(store, "teacher_outputs", {"data": "data", "model": "dyn"})
    table = store.table("teacher_outputs")
    data = store.table(key)
    for number in data.shards():
        mine, theirs = (
            [i for batch in t.shard_batches(number, ["id"]) for i in batch.column(0).to_pylist()]
            for t in (table, data)
        )
        assert mine == theirs
    assert manifest.rows == 36
    found = table.to_table()
    log_p = np.float32(found.column("log_probability").to_pylist())
    vectors = np.float32(found.column("embedding").to_pylist())
    x = load_examples(data).x
    each = [predict(classifier_from_table(store.table("dyn"), r), x) for r in range(2)]
    mean = np.mean([np.exp(log_probabilities(logits)) for logits, _ in each], axis=0)
    np.testing.assert_allclose(log_p, np.log(mean), rtol=1e-4, atol=1e-5)
    deep = each[0][1]
    np.testing.assert_allclose(
        vectors, deep / np.linalg.norm(deep, axis=1, keepdims=True), atol=1e-5
    )
    assert table.schema.field("embedding").type == schemas.vector(16)


def test_the_mean_is_one_of_probabilities():
    one, two = np.log([[0.9, 0.1]]), np.log([[0.1, 0.9]])
    np.testing.assert_allclose(np.exp(mean_log_probability([one, two])), [[0.5, 0.5]], rtol=1e-6)
    three = mean_log_probability([one, two, two])
    np.testing.assert_allclose(np.exp(three), [[1.1 / 3, 1.9 / 3]], rtol=1e-6)
    far = mean_log_probability([np.array([[0.0, 500.0]])])
    np.testing.assert_allclose(far, [[-500.0, 0.0]])


def test_vectors_have_length_1_whatever_they_were():
    made = unit_rows(np.float32([[3, 4], [0, 0], [1e-30, 0], [1e30, 1e30]]))
    half = np.sqrt(0.5)
    np.testing.assert_allclose(made, [[0.6, 0.8], [half, half], [1, 0], [half, half]], rtol=1e-6)
    with pytest.raises(ModelError, match="row 1 of the shard"):
        unit_rows(np.float32([[1, 2], [np.inf, 0]]))


def test_text_is_trained_on_its_embeddings(store):
    label = np.arange(24) % 2
    rows = rows_of("text", 24, train=18, contents=[f"text {i}" for i in range(24)], label=label)
    key = write_data(store, rows, kind="text", classes=("x", "y"), shards=2)
    field = schemas.pa.field("embedding", schemas.vector(4), nullable=False)
    vectors = [points(24)[0][i] + 3 * (label[i] - 0.5) for i in range(24)]
    made = [{"id": r["id"], "embedding": v} for r, v in zip(rows, vectors, strict=True)]
    schema = schemas.pa.schema([schemas.id_field(), field])
    write(store, schema, [made], step="embed", inputs=[key])
    with pytest.raises(RecipeError, match="Add an `embed` step"):
        train(store)
    inputs = {"data": "data", "embeddings": "embed"}
    run(store, "train_classifier", inputs, as_="dyn", **SMALL)
    with pytest.raises(RecipeError, match="Add an `embed` step"):
        run(store, "teacher_outputs", {"data": "data", "model": "dyn"})
    outputs = run(store, "teacher_outputs", {**inputs, "model": "dyn"})
    assert outputs.rows == 24


def test_over_grown_data_the_teacher_reads_the_new_rows_alone(store, tmp_path):
    write_points(store, 30, train=24)
    train(store)
    inputs = {"data": "data", "model": "dyn"}
    first = run(store, "teacher_outputs", inputs)
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    tables = []
    for place, reuse in ((store, True), (Store(tmp_path / "other"), False)):
        write_points(place, 41, train=24)
        step = STEPS["teacher_outputs"]
        made = step(step.options(), inputs, StepContext(place, "grown", threads=1, reuse=reuse))
        assert made.notes.get("reused") == ({first.key: 30} if reuse else None)
        tables.append(place.table(made.key).to_table())
    assert tables[0].num_rows == 41
    same_rows(*tables)


def test_a_teacher_of_other_rows_or_classes_is_refused(store):
    write_points(store)
    train(store)
    x, label = points(6)
    rows = rows_of("features", 6, train=6, contents=x.tolist(), label=label)
    write_data(store, rows, kind="features", classes=("a", "b", "z"), name="named")
    with pytest.raises(InputError, match="with the same classes"):
        run(store, "teacher_outputs", {"data": "named", "model": "dyn"})
    narrow = rows_of("features", 6, train=6, contents=x[:, :3].tolist(), label=label)
    write_data(store, narrow, kind="features", name="narrow")
    with pytest.raises(InputError, match=r"expected rows of shape \[4\].* found \[3\]"):
        run(store, "teacher_outputs", {"data": "narrow", "model": "dyn"})


# -- decided outcomes --------------------------------------------------------------------------


def test_one_class_alone_trains_and_is_always_right(store):
    x, _ = points(12)
    rows = rows_of("features", 12, train=9, contents=x.tolist(), label=np.zeros(12, int))
    write_data(store, rows, kind="features", classes=("only",))
    train(store)
    ids = [row["id"] for row in rows[:9]]
    found = trajectories(store.table("dyn"), ["margin", "correct", "el2n"], ids)[0]
    assert (found["margin"] == 0).all() and found["correct"].all() and (found["el2n"] == 0).all()
    assert run(store, "teacher_outputs", {"data": "data", "model": "dyn"}).rows == 12


def test_a_class_that_training_lacks_is_allowed(store):
    x, label = points(12)
    rows = rows_of("features", 12, train=9, contents=x.tolist(), label=label)
    write_data(store, rows, kind="features", classes=("a", "b", "c", "unseen"))
    assert train(store).rows == 27
    run(store, "teacher_outputs", {"data": "data", "model": "dyn"})
    first = next(store.table("teacher_outputs").batches(["log_probability"])).to_pylist()[0]
    assert len(first["log_probability"]) == 4


def test_no_row_to_train_on_is_refused(store):
    x, label = points(6)
    rows = rows_of("features", 6, train=0, contents=x.tolist(), label=label)
    write_data(store, rows, kind="features")
    with pytest.raises(InputError, match="expected rows in the split train"):
        train(store)


def test_a_loss_that_is_no_number_names_epoch_and_remedy(store, monkeypatch):
    # Gradients are cut, so a loss overflows only where they are not.
    monkeypatch.setattr("prunery.pipelines.classifier._LONGEST_GRADIENT", float("inf"))
    write_points(store)
    with pytest.raises(ModelError, match=r"run 0, epoch \d+: .*`learning_rate`"):
        train(store, learning_rate=99.0, epochs=200)


def test_a_factory_of_ones_own_is_known_by_its_source(store, tmp_path, monkeypatch):
    file = tmp_path / "own_factory.py"
    source = "from torch import nn\ndef make(shape, classes): return nn.Linear(shape[0], classes)\n"
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    write_points(store)
    first = train(store, model="own_factory:make")
    assert set(first.models) == {"factory"}
    run(store, "teacher_outputs", {"data": "data", "model": "dyn"})
    file.write_text(source + "# another\n")
    assert train(store, model="own_factory:make").key != first.key
    with pytest.raises(RecipeError, match="PYTHONPATH"):
        train(store, model="no_such_factory:make")
    with pytest.raises(RecipeError, match="expected a model among"):
        train(store, model="vgg")
