"""The step: what it writes, what it shares and resumes, and what it refuses."""

import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from prunery.errors import InputError, ModelError, StoreError
from prunery.pipelines.compression import statistics as module
from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.statistics import (
    StatisticsTable,
    keyed,
    layer_statistics,
    named,
    statistics_rows,
)
from prunery.pipelines.compression.tables import CALIBRATION, STATISTICS
from prunery.pipelines.compression.walk import batches_of, walk
from prunery.pipelines.compression.work import work_folder
from prunery.pipelines.engine import StepContext, run_shard, table_key
from prunery.pipelines.steps import STEPS
from prunery.pipelines.steps.weight_statistics import Statistic
from prunery.pruners.models.streamed_model import StreamedModel
from prunery.pruners.signals.block_statistics import FORWARD_STATISTICS, GRADIENT_STATISTICS
from prunery.storage import Store

from ...tiny_causal import saved_model
from ..sft_rows import write

SPEC = STEPS["weight_statistics"]
SOME = ["sum_squares", "m2", "gram", "weighted_gram", "cosine", "attention"]


def rows(count=9, longest=14, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(2, longest)).tolist() for _ in range(count)]


def put(store, given, name="rows"):
    made = [
        {
            "id": 100 + number,
            "domain": "",
            "input_ids": ids,
            "labels": ids,
            "sources": [number],
            "score": None,
        }
        for number, ids in enumerate(given)
    ]
    write(store, name, "calibration_rows", CALIBRATION, [made[:4], made[4:]])


def put_rows(store, name, parts):
    """A committed table of statistics."""
    with store.write(
        name=name,
        step="weight_statistics",
        version=1,
        options={"name": name},
        inputs=[],
        models={},
        seed=0,
        schema=STATISTICS,
    ) as writer:
        for number in writer.pending(len(parts)):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(parts[number], STATISTICS))
        writer.commit()
    store.point(name, writer.key)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(store, folder, *, name="statistics", workers=1, pool=None, **options):
    options = {"statistics": SOME, "tokens_a_batch": 40, "model": str(folder), **options}
    context = StepContext(store, name, threads=1, workers=workers, pool=pool)
    return SPEC(SPEC.options(**options), {"rows": "rows"}, context)


def digest(store, name="statistics"):
    table = store.table(name)
    return [part["sha256"] for part in table.manifest.parts]


def same(one, other, rtol=0.0):
    assert set(one) == set(other)
    for key, array in one.items():
        assert array.dtype == other[key].dtype
        atol = rtol * float(array.double().abs().max()) if array.numel() else 0
        torch.testing.assert_close(other[key], array, rtol=rtol, atol=atol)


def test_the_names_of_the_step_are_those_that_are_made():
    assert set(Statistic.__args__) == FORWARD_STATISTICS | GRADIENT_STATISTICS


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "bert"])
def test_the_table_holds_what_a_walk_gives(tmp_path, cache, name):
    folder, store = saved_model(tmp_path, name), Store(tmp_path / "store")
    put(store, rows())
    manifest = run(store, folder)
    model, wanted = StreamedModel(folder), []

    def visit(here):
        wanted.append(layer_statistics(here, frozenset(SOME)))
        return {}, []

    pad = model.config.pad_token_id or 0
    given = [np.array(row) for row in rows()]
    walk(model, batches_of(given, tokens=40, pad=pad), LayerJournal(tmp_path / "w"), visit)
    found = StatisticsTable(store.table("statistics"))
    assert found.layers == [0, 1, 2]
    assert found.parts == [0]
    for layer in found.layers:
        same(wanted[layer], found.layer(layer))
    assert manifest.models["model"]
    assert not list(cache.glob("compression/*"))


def test_three_parts_merged_are_one(tmp_path, cache):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    put(store, rows())
    more = {"statistics": [*SOME, "gradient", "gradient_square"]}
    run(store, folder, name="one", **more)
    run(store, folder, name="three", parts=3, **more)
    one, three = (StatisticsTable(store.table(name)) for name in ("one", "three"))
    assert three.parts == [0, 1, 2]
    for layer in one.layers:
        same(one.layer(layer), three.layer(layer), 1e-3)


class Elsewhere:
    """A pool that makes shards as another process would: from a job that was sent, last first."""

    least = 1

    def run(self, job, pending, progress):
        for number in reversed(pending):
            run_shard(pickle.loads(pickle.dumps(job)), number)


def test_other_processes_share_the_parts(tmp_path, cache):
    folder = saved_model(tmp_path, "llama")
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    for one in (store, other):
        put(one, rows())
    run(store, folder, parts=3)
    run(other, folder, parts=3, workers=2, pool=Elsewhere())
    assert digest(store) == digest(other)
    assert not list(cache.glob("compression/*"))


def test_arrays_are_cut_and_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLICE_BYTES", 40)
    rng = torch.Generator().manual_seed(0)
    arrays = {
        ("a.b", "gram"): torch.randn(7, 7, generator=rng),
        ("a.b", "mean"): torch.randn(5, generator=rng).double(),
        ("a.b", "count"): torch.tensor(9),
        ("e", "attention"): torch.zeros(0, dtype=torch.float64),
    }
    parts = [[], []]
    for part in (0, 1):
        for layer in (0, 1):
            for made in statistics_rows(part, layer, arrays):
                parts[part] += made.to_pylist()
    assert max(len(row["values"]) for row in parts[0]) == 40
    assert sum(row["statistic"] == "gram" for row in parts[0]) == 2 * 5
    store = Store(tmp_path / "store")
    put_rows(store, "one", [parts[0]])
    for layer in (0, 1):
        same(arrays, StatisticsTable(store.table("one")).layer(layer))
    put_rows(store, "two", parts)
    merged = StatisticsTable(store.table("two")).layer(1)
    assert int(merged["a.b", "count"]) == 18
    torch.testing.assert_close(merged["a.b", "gram"], 2 * arrays["a.b", "gram"])
    with pytest.raises(InputError, match="statistics of layer 5; it holds layers 0 to 1"):
        StatisticsTable(store.table("two")).layer(5)
    cut = [r for r in parts[0] if (r["layer"], r["statistic"], r["slice"]) != (1, "gram", 2)]
    assert len(cut) == len(parts[0]) - 1
    put_rows(store, "cut", [cut])
    with pytest.raises(StoreError, match=r"layer 1, a\.b gram: expected \[7, 7\] of float32"):
        StatisticsTable(store.table("cut")).layer(1)
    lacking = [row for row in parts[1] if row["layer"] == 0]
    put_rows(store, "lack", [parts[0], lacking])
    with pytest.raises(StoreError, match="layer 1 of part 1, found none"):
        StatisticsTable(store.table("lack")).layer(1)


def test_names_for_the_journal_come_back():
    arrays = {("", "count"): torch.tensor(1), ("mlp.experts.0.up", "gram"): torch.zeros(1)}
    assert keyed(named(arrays)) == arrays


# -- the key -----------------------------------------------------------------------------------


def test_the_key_follows_what_decides_the_numbers(tmp_path, cache):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    put(store, rows())

    def key(**options):
        options = {"statistics": SOME, "model": str(folder), **options}
        return table_key(SPEC, SPEC.options(**options), {"rows": "rows"}, StepContext(store))

    first = key()
    assert key(device="cpu") == first
    assert key(statistics=[*reversed(SOME), "gram"]) == first
    assert key(statistics=["gram"], r_min=0.1) == key(statistics=["gram"])
    others = [
        key(r_min=0.1),
        key(power=2),
        key(dtype="bfloat16"),
        key(tokens_a_batch=41),
        key(parts=2),
        key(statistics=["gram"]),
        key(model=str(saved_model(tmp_path / "b", "llama", seed=1))),
    ]
    assert len({first, *others}) == 8


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([5], "row 106 of `rows`: expected at least 2 tokens to calibrate on; found 1"),
        ([5, 300], "row 106 of `rows`: expected token ids from 0 to 299; found 300"),
        ([5, -1], "row 106 of `rows`: expected token ids from 0 to 299; found -1"),
        ([5] * 129, "row 106 of `rows`: expected at most 128 tokens, the model's window"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, cache, row, message):
    store = Store(tmp_path / "store")
    given = rows()
    given[6] = row
    put(store, given)
    with pytest.raises(InputError, match=message):
        run(store, saved_model(tmp_path, "gpt2"))


def test_no_rows_are_refused(tmp_path, cache):
    store = Store(tmp_path / "store")
    put(store, [])
    with pytest.raises(InputError, match="expected calibration rows in `rows`"):
        run(store, saved_model(tmp_path, "llama"))


def test_an_unknown_architecture_and_a_masked_models_gradients_are_refused(tmp_path, cache):
    store = Store(tmp_path / "store")
    put(store, rows())
    with pytest.raises(InputError, match="is a masked one. Leave them out"):
        run(store, saved_model(tmp_path, "bert"), statistics=["gradient"])
    folder = saved_model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ModelError, match="'gemma'"):
        run(store, folder)


def test_a_weight_that_is_no_number_stops_it_and_the_layers_before_are_kept(tmp_path, cache):
    from safetensors.torch import load_file, save_file

    store, folder = Store(tmp_path / "store"), saved_model(tmp_path, "llama")
    put(store, rows())
    path = folder / "model.safetensors"
    sound = load_file(path)
    poisoned = {name: tensor.clone() for name, tensor in sound.items()}
    poisoned["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(poisoned, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj"):
        run(store, folder)
    (left,) = cache.glob("compression/*")
    assert LayerJournal(left / "statistics").done() == 2


# -- killed ------------------------------------------------------------------------------------

# Both deaths in children of one process, for its imports take the time.
_KILLED = """
import os, signal, sys
import faiss
from prunery.pipelines.compression import gradients, journal, statistics
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

folder, statistics, *deaths = sys.argv[1:]
record = journal.LayerJournal.record
spec = STEPS["weight_statistics"]
for death in deaths:
    store, place, at = death.split(":")
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue

    def killed(self, layer, tensors, rows=()):
        if self.folder.name == place and layer == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, layer, tensors, rows)

    journal.LayerJournal.record = killed
    os.environ["PRUNERY_CACHE"] = store + "-cache"
    options = spec.options(
        model=folder, statistics=statistics.split(","), tokens_a_batch=40, parts=2
    )
    spec(options, {"rows": "rows"}, StepContext(Store(store), "statistics", threads=1))
    os._exit(0)
"""


def test_a_killed_step_goes_on_with_the_same_table(tmp_path, cache, monkeypatch):
    folder, names = saved_model(tmp_path, "llama"), [*SOME, "gradient_abs"]
    places = {"statistics": 2, "backward": 1}
    deaths = []
    for place, at in places.items():
        put(Store(tmp_path / place), rows())
        deaths.append(f"{tmp_path / place}:{place}:{at}")
    command = [sys.executable, "-c", _KILLED, str(folder), ",".join(names), *deaths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, check=True, timeout=120, stdout=subprocess.PIPE, text=True
    )
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * 2

    whole = Store(tmp_path / "whole")
    put(whole, rows())
    run(whole, folder, statistics=names, parts=2)
    block = StreamedModel.block
    for place in places:
        monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / f"{place}-cache"))
        left = work_folder(whole.table("statistics").key, 0)
        assert LayerJournal(left / "statistics").done() == (2 if place == "statistics" else 3)
        asked = []
        monkeypatch.setattr(
            StreamedModel, "block", lambda self, n, to=asked: (to.append(n), block(self, n))[1]
        )
        run(Store(tmp_path / place), folder, statistics=names, parts=2)
        # Layers that were done are not run again.
        first = [2, 0, 1, 2, 2, 1, 0] if place == "statistics" else [1, 0]
        assert asked == [*first, *[0, 1, 2] * 2, 2, 1, 0]
        assert digest(Store(tmp_path / place)) == digest(whole)
        assert not list((tmp_path / f"{place}-cache").glob("compression/*"))


def test_the_rows_are_those_of_the_schema(tmp_path, cache):
    folder, store = saved_model(tmp_path, "llama"), Store(tmp_path / "store")
    put(store, rows())
    run(store, folder, statistics=["mean"])
    table = store.table("statistics").to_table()
    assert table.schema == STATISTICS
    assert len(set(table.column("id").to_pylist())) == table.num_rows
    assert set(table.column("statistic").to_pylist()) == {"mean", "count"}
    assert pa.compute.sum(table.column("part")).as_py() == 0
