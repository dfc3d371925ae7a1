"""The dynamics table: written epoch by epoch, taken up again, read as aligned arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError, ModelError, StoreError
from prunery.pipelines import dynamics
from prunery.pipelines.classifier import ModelSpec, fit, make_model, predict
from prunery.pipelines.dataset_tables import DYNAMICS
from prunery.pipelines.dynamics import DynamicsRecorder, gradient_norms, measures, trajectories
from prunery.storage import Store

from .classifier_rows import examples, write

NAMES = ["true_probability", "margin", "correct", "loss_trajectory", "el2n", "probability_change"]
RUNS, EPOCHS = 2, 3


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def logits_of(n, runs=RUNS, epochs=EPOCHS, seed=0):
    """(runs, epochs, n, 3) float32."""
    return np.random.default_rng(seed).normal(0, 2, (runs, epochs, n, 3)).astype(np.float32)


def record(store, rows, logits, name="dynamics", **options):
    runs, epochs = logits.shape[:2]
    with DynamicsRecorder(store, name, rows, runs, epochs, **options) as recorder:
        for run in range(runs):
            for epoch in range(epochs):
                recorder.epoch(run, epoch, logits[run, epoch])
        return recorder.commit()


def expected(rows, logits):
    """Signals of all epochs by the pure function, (N, runs * epochs)."""
    columns = {name: [] for name in NAMES}
    for run in logits:
        before = None
        for epoch in run:
            found = measures(epoch, rows.label, before)
            before = dynamics.log_probabilities(epoch).astype(np.float32)
            found["loss_trajectory"] = found.pop("loss")
            for name, column in found.items():
                columns[name].append(column)
    return {name: np.stack(column, axis=1) for name, column in columns.items()}


def test_a_loop_of_ones_own_is_recorded_and_read(store):
    rows = examples(12)
    model = make_model(ModelSpec("mlp", hidden=16), (4,), 3, 0)
    with DynamicsRecorder(store, "mine", rows, epochs=3, gradient_norm=True) as recorder:
        for epoch in range(3):
            fit(model, rows, steps=4, batch_size=4, learning_rate=0.05, seed=epoch)
            logits, features = predict(model, rows.x)
            recorder.epoch(0, epoch, logits, features=features)
        recorder.commit()
    found, runs = trajectories(store.table("mine"), ["margin", "gradient_norm"], rows.ids)
    assert runs == 1
    np.testing.assert_array_equal(found["margin"][:, -1], measures(logits, rows.label)["margin"])
    wanted = gradient_norms(model, rows.x, rows.label)
    np.testing.assert_allclose(found["gradient_norm"][:, -1], wanted, rtol=1e-5)
    assert (found["margin"][:, 2] > found["margin"][:, 0]).mean() > 0.8
    manifest = store.table("mine").manifest
    assert manifest.notes == {"runs": 1, "epochs": 3}
    assert manifest.options["gradient_norm"] is True


def test_every_signal_of_every_epoch_is_in_its_place(store):
    rows, logits = examples(9), logits_of(9)
    record(store, rows, logits)
    table = store.table("dynamics")
    found, runs = trajectories(table, NAMES, rows.ids)
    assert runs == RUNS
    for name, column in expected(rows, logits).items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)
    assert found["correct"].dtype == np.bool_
    assert found["probability_change"].shape == (9, RUNS * (EPOCHS - 1))
    assert table.shards() == list(range(RUNS * EPOCHS))
    first = next(table.shard_batches(4)).to_pylist()[0]
    assert (first["run"], first["epoch"], first["sample"]) == (1, 1, rows.ids[0])
    assert first["gradient_norm"] is None and first["logits"] == []
    assert next(table.shard_batches(3)).column("probability_change").null_count == 9
    assert len({row["id"] for row in table.to_table(["id"]).to_pylist()}) == 9 * 6


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), taken=st.integers(0, 9), runs=st.integers(1, 3))
def test_rows_are_aligned_with_the_ids_asked_for(tmp_path_factory, seed, taken, runs):
    rng = np.random.default_rng(seed)
    rows = examples(9, ids=rng.choice(1 << 40, 9, replace=False).astype(np.int64))
    logits = logits_of(9, runs=runs, seed=seed)
    store = Store(tmp_path_factory.mktemp("aligned"))
    record(store, rows, logits)
    order = rng.permutation(9)[:taken]
    found, _ = trajectories(store.table("dynamics"), NAMES, rows.ids[order])
    for name, column in expected(rows, logits).items():
        np.testing.assert_array_equal(found[name], column[order])


def test_logits_are_kept_where_they_are_asked_for(store, monkeypatch):
    rows, logits = examples(7), logits_of(7)
    monkeypatch.setattr(dynamics, "_ROWS_A_WRITE", 3)
    record(store, rows, logits, keep_logits=True)
    kept = store.table("dynamics").to_table(["logits"]).column("logits").to_pylist()
    np.testing.assert_array_equal(np.float32(kept).reshape(logits.shape), logits)
    found = trajectories(store.table("dynamics"), ["el2n"], rows.ids)[0]["el2n"]
    np.testing.assert_array_equal(found, expected(rows, logits)["el2n"])


def test_a_stopped_recording_goes_on_where_it_was(store, tmp_path):
    rows, logits = examples(8), logits_of(8)
    whole = record(Store(tmp_path / "whole"), rows, logits)

    def opened():
        return DynamicsRecorder(store, "dynamics", rows, RUNS, EPOCHS)

    with opened() as recorder:
        for epoch in range(2):
            recorder.epoch(0, epoch, logits[0, epoch])
    with opened() as recorder:
        assert recorder.pending() == [(0, 2), (1, 0), (1, 1), (1, 2)]
        with pytest.raises(InputError, match="needs the logits of epoch 1"):
            recorder.epoch(0, 2, logits[0, 2])
        recorder.epoch(0, 1, logits[0, 1])  # is there already: only remembered
        recorder.epoch(0, 2, logits[0, 2])
        with pytest.raises(StoreError, match="missing"):
            recorder.commit()
        for epoch in range(3):
            recorder.epoch(1, epoch, logits[1, epoch])
        assert recorder.pending() == []
        made = recorder.commit()
    assert made.key == whole.key
    assert made.logical_digest == whole.logical_digest


def test_another_runs_epoch_is_not_taken_for_the_one_before(store):
    rows, logits = examples(5), logits_of(5)
    with DynamicsRecorder(store, "d", rows, RUNS, EPOCHS) as recorder:
        recorder.epoch(0, 0, logits[0, 0])
        for run, epoch in ((1, 1), (0, 2)):
            with pytest.raises(InputError, match="needs the logits of epoch"):
                recorder.epoch(run, epoch, logits[run, epoch])


def test_the_key_tells_trainings_apart(store):
    rows, logits = examples(5), logits_of(5)
    key = record(store, rows, logits, identity={"network": "a"}).key
    with pytest.raises(InputError, match="in the store already"):
        record(store, rows, logits, identity={"network": "a"})
    other = examples(5)
    other.label[0] = 2
    for made in (
        record(store, rows, logits, identity={"network": "b"}),
        record(store, rows, logits[:1], identity={"network": "a"}),
        record(store, other, logits, identity={"network": "a"}),
    ):
        assert made.key != key


def test_what_does_not_fit_is_refused(store):
    rows, logits = examples(5), logits_of(5)
    with pytest.raises(InputError, match="at least one run"):
        record(store, rows, logits[:0])
    twice = examples(5, ids=np.array([1, 2, 3, 2, 4]))
    with pytest.raises(InputError, match="found id 2 more than once"):
        record(store, twice, logits)
    closed = DynamicsRecorder(store, "d", rows, RUNS, EPOCHS)
    with pytest.raises(InputError, match="`with`"):
        closed.epoch(0, 0, logits[0, 0])
    with DynamicsRecorder(store, "d", rows, RUNS, EPOCHS) as recorder:
        for run, epoch in ((2, 0), (0, 3), (-1, 0)):
            with pytest.raises(InputError, match="a run below 2 and an epoch below 3"):
                recorder.epoch(run, epoch, logits[0, 0])
        with pytest.raises(InputError, match="of the same rows"):
            recorder.epoch(0, 0, logits[0, 0, :4])
        with pytest.raises(ModelError, match="finite logits"):
            recorder.epoch(0, 0, np.where(logits[0, 0] > 1, np.nan, logits[0, 0]))
        with pytest.raises(InputError, match="found one with gradient_norm=False"):
            recorder.epoch(0, 0, logits[0, 0], gradient_norm=np.ones(5))
        assert len(recorder.pending()) == RUNS * EPOCHS
    with DynamicsRecorder(store, "g", rows, RUNS, EPOCHS, gradient_norm=True) as recorder:
        with pytest.raises(InputError, match="found none with gradient_norm=True"):
            recorder.epoch(0, 0, logits[0, 0])
        for wrong in (np.ones(4), np.full(5, np.inf)):
            with pytest.raises(InputError, match="`gradient_norm` must be finite"):
                recorder.epoch(0, 0, logits[0, 0], gradient_norm=wrong)


def test_trajectories_that_are_not_there_are_refused(store):
    rows, logits = examples(6), logits_of(6)
    record(store, rows, logits)
    table = store.table("dynamics")
    with pytest.raises(InputError, match=r"Set `gradient_norm: last_layer`"):
        trajectories(table, ["el2n", "gradient_norm"], rows.ids)
    with pytest.raises(InputError, match="found loss"):
        trajectories(table, ["loss"], rows.ids)
    with pytest.raises(InputError, match="unique ids; found 1003"):
        trajectories(table, ["el2n"], [1003, 1001, 1003])
    with pytest.raises(InputError, match="none of row 7 in run 0, epoch 0"):
        trajectories(table, ["el2n"], [1003, 7, 1001])
    made = table.to_table().to_pylist()
    gap = [row for row in made if (row["sample"], row["run"], row["epoch"]) != (1002, 1, 1)]
    holed = store.table(write(store, DYNAMICS, [gap], name="holed"))
    with pytest.raises(InputError, match="none of row 1002 in run 1, epoch 1"):
        trajectories(holed, ["el2n"], rows.ids)
    assert trajectories(holed, ["el2n"], [1003])[0]["el2n"].shape == (1, 6)
    empty = store.table(write(store, DYNAMICS, [[]], name="empty"))
    with pytest.raises(StoreError, match="holds no dynamics"):
        trajectories(empty, ["el2n"], rows.ids)


def test_any_cut_into_shards_reads_the_same(store):
    rows, logits = examples(6), logits_of(6)
    record(store, rows, logits)
    made = store.table("dynamics").to_table().to_pylist()
    order = np.random.default_rng(0).permutation(len(made))
    mixed = [[made[place] for place in part] for part in np.array_split(order, 4)]
    other = store.table(write(store, DYNAMICS, mixed, name="mixed"))
    for name, column in trajectories(other, NAMES, rows.ids)[0].items():
        np.testing.assert_array_equal(column, expected(rows, logits)[name])


def test_a_single_epoch_has_no_change(store):
    rows, logits = examples(4), logits_of(4, runs=2, epochs=1)
    record(store, rows, logits)
    found, runs = trajectories(store.table("dynamics"), NAMES, rows.ids)
    assert runs == 2
    assert found["probability_change"].shape == (4, 0)
    assert found["margin"].shape == (4, 2)


def test_tensors_of_a_loop_are_taken_as_they_are(store):
    rows = examples(4)
    logits = torch.from_numpy(logits_of(4)[0, 0])
    with DynamicsRecorder(store, "d", rows, 1, 1) as recorder:
        recorder.epoch(0, 0, logits)
        assert recorder.commit().rows == 4
