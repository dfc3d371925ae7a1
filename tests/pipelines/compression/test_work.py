import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import pytest
import torch

from prunery.errors import PruneryWarning, StoreError
from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.compression.work import remove_work, unfinished_model, work_folder, working
from prunery.storage import Store

from ...tiny_causal import saved_model
from .stage import calibration, run

KEY = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compression"


@contextmanager
def largest_file(size):
    """No file may grow beyond some bytes, as on a disk that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- one process at a time -------------------------------------------------------------------------

# The first stops in the middle of the walk until it is told to go on; the second starts there.
TWO = """
import os, sys, time, warnings
from pathlib import Path
import faiss
from prunery.pipelines.compression import journal
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

folder, source = Path(sys.argv[1]), sys.argv[2]
signs = folder / "signs"
signs.mkdir()
spec = STEPS["compress_weights"]
record = journal.LayerJournal.record

def wait(name):
    until = time.monotonic() + 60
    while not (signs / name).exists():
        if time.monotonic() > until:
            os._exit(3)
        time.sleep(0.01)

def slow(self, layer, *given):
    if layer == 1:
        (signs / "first is at layer 1").touch()
        wait("go on")
    record(self, layer, *given)

def said(message, *_, **__):
    (signs / "second waits").write_text(str(message))

def make(name):
    os.environ["PRUNERY_CACHE"] = str(folder / "cache")
    context = StepContext(Store(folder / name), name="small", threads=1)
    spec(spec.options(model=source), {"plan": "plan", "rows": "rows"}, context)
    os._exit(0)

children = []
for name in ("first", "second"):
    child = os.fork()
    if not child:
        try:
            if name == "first":
                journal.LayerJournal.record = slow
            else:
                warnings.showwarning = said
                wait("first is at layer 1")
            make(name)
        finally:
            os._exit(1)
    children.append(child)
for child in children:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_processes_do_not_write_over_each_other(tmp_path):
    source, stores = str(saved_model(tmp_path, "llama")), {}
    for name in ("whole", "first", "second"):
        stores[name] = Store(tmp_path / name)
        rows = calibration(stores[name])
        plan = run(stores[name], "plan_compression", "plan", model=source, method="sparsegpt")
    inputs = {"plan": plan.key, "rows": rows}
    whole = run(stores["whole"], "compress_weights", "small", inputs, model=source)
    signs = tmp_path / "signs"
    both = subprocess.Popen(
        [sys.executable, "-c", TWO, str(tmp_path), source],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (signs / "second waits").exists() and time.monotonic() < until:
        assert both.poll() is None
        time.sleep(0.02)
    try:
        assert (
            "another process is at work on the same table" in (signs / "second waits").read_text()
        )
    finally:
        (signs / "go on").touch()
        told, _ = both.communicate(timeout=100)
    assert told.split() == ["0", "0"]
    for name in ("first", "second"):
        made = stores[name].table("small").manifest
        assert made.key == whole.key and made.logical_digest == whole.logical_digest
        assert made.attachments == whole.attachments
    assert not list((tmp_path / "cache" / "compression").glob("*"))


def test_a_lock_of_the_dead_is_free(cache):
    child = os.fork()
    if not child:
        with working(KEY):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(cache.glob(".*.lock"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruneryWarning)
        with working(KEY) as folder:
            assert folder == work_folder(KEY)
    assert not list(cache.glob("*"))


def test_what_another_holds_is_not_removed(cache):
    other = KEY[::-1]
    for key, part in ((KEY, 0), (KEY, 1), (KEY, 11), (other, 0)):
        work_folder(key, part).mkdir(parents=True)
    (cache / f"{KEY[:32]}-0-rotated").mkdir()
    with working(KEY, 1):
        remove_work(KEY)
        left = {path.name for path in cache.iterdir() if path.is_dir()}
        assert left == {f"{KEY[:32]}-1", f"{other[:32]}-0"}
    remove_work(KEY)
    assert [path.name for path in cache.iterdir()] == [f"{other[:32]}-0"]


# -- a disk that fills -----------------------------------------------------------------------------


def test_layers_that_are_done_outlive_a_full_disk(tmp_path):
    journal = LayerJournal(tmp_path / "work")
    journal.record(0, {"weight": torch.ones(10)})
    with (
        largest_file(20_000),
        pytest.raises(StoreError, match=r"layer-00001.* expected to write the work of a layer"),
    ):
        journal.record(1, {"weight": torch.ones(10_000)})
    assert journal.done() == 1
    assert not list(journal.folder.glob(".*"))
    journal.record(1, {"weight": torch.ones(10_000)})
    assert journal.done() == 2


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path):
    work = tmp_path / "work"

    def fail():
        with unfinished_model(work) as folder:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"expected to write the compressed model there.*No space"):
        fail()
    assert not work.exists()


def test_a_folder_of_a_models_files_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    store, source = Store(tmp_path / "store"), saved_model(tmp_path, "llama")
    calibration(store)
    run(store, "plan_compression", "plan", model=str(source), method="magnitude")
    run(store, "compress_weights", "small", {"plan": "plan", "rows": "rows"}, model=str(source))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match=r"expected to put a model's files there.*No space left"):
        model_folder(store.table("small"))
    assert not list((tmp_path / "cache" / "causal").glob("*"))


@pytest.mark.parametrize(
    ("step", "size"),
    [
        ("weight_statistics", 8_000),
        ("compress_weights", 8_000),  # hidden states and layers
        ("compress_weights", 60_000),  # the model
        ("compensate_weights", 60_000),
        ("recover_weights", 60_000),
        ("search_budgets", 2_000),
        ("activation_thresholds", 8_000),
        ("verify_compression", 60_000),
        ("export_model", 60_000),
    ],
)
def test_a_disk_that_fills_at_any_step_is_told_and_costs_nothing(tmp_path, step, size):
    store, source = Store(tmp_path / "store"), saved_model(tmp_path, "llama")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    tables = {"rows": calibration(store)}
    made, wanted = _steps(source)[step]
    for name, needs, options in made:
        run(store, name, name, {r: tables[k] for r, k in needs.items()}, **options)
        tables[name] = name
    digests = {name: store.table(name).manifest.logical_digest for name in tables if name != "rows"}
    needs, options = wanted
    inputs = {role: tables[key] for role, key in needs.items()}
    with largest_file(size), pytest.raises(StoreError, match=r"expected to write"):
        run(store, step, step, inputs, **options)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for name, digest in digests.items():
        assert store.table(name).manifest.logical_digest == digest
    run(store, step, step, inputs, **options)
    assert not list((tmp_path / "cache" / "compression").glob("*"))


def _steps(source):
    """Step: those before it as (step, inputs, options), then its own inputs and options."""
    model, rows = {"model": str(source)}, {"rows": "rows"}
    statistics = (
        "weight_statistics",
        rows,
        {**model, "statistics": ["mean", "m2", "gram", "sum_squares"]},
    )
    plan = ("plan_compression", {}, {**model, "method": "magnitude"})
    small = ("compress_weights", {"plan": "plan_compression", **rows}, model)
    flap = [
        statistics,
        ("plan_compression", {}, {**model, "method": "flap", "sparsity": 0.25}),
        (*small[:2], {**model, "compensate": "none"}),
    ]
    few = {"offspring": 2, "survivors": [2], "tokens": [100]}
    told = {"dense": str(source), "control": "none", "speed": False, "tolerance": 100.0}
    return {
        "weight_statistics": ([], statistics[1:]),
        "compress_weights": ([plan], small[1:]),
        "compensate_weights": (
            flap,
            ({"model": "compress_weights", "statistics": "weight_statistics"}, model),
        ),
        "recover_weights": (
            [plan, small],
            ({"model": "compress_weights", **rows}, {"method": "bias_norm", "steps": 2}),
        ),
        "search_budgets": (
            [],
            (rows, {**model, "method": "magnitude", "rounds": 1, "generations": 1, **few}),
        ),
        "activation_thresholds": ([], (rows, model)),
        "verify_compression": ([plan, small], ({"model": "compress_weights", **rows}, told)),
        "export_model": ([plan, small], ({"model": "compress_weights"}, {})),
    }
