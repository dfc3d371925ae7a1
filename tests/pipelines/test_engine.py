"""A step runs once for a key, goes on where it was stopped, and never changes a row by it."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from prunery.errors import InputError, PruneryError
from prunery.pipelines import engine
from prunery.pipelines.engine import StepContext
from prunery.pipelines.recipe import apply_overrides, parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.steps import STEPS
from prunery.pipelines.steps import chunk as chunk_step
from prunery.storage import Store

RECIPE = """
name: chunks
steps:
  chunks:
    step: chunk
    path: {path}
    max_tokens: 32
    shard_bytes: 2000
"""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps({"text": f"Row {i} speaks of {i * 7919 % 1000}. It ends here.", "title": "t"})
        for i in range(400)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_for(path, *overrides):
    return apply_overrides(parse_recipe(RECIPE.format(path=path)), overrides)


class Counting:
    def __init__(self):
        self.calls = []

    def start(self, name, total):
        self.calls.append(("start", name, total))

    def advance(self, n=1):
        self.calls.append(("advance", n))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture(scope="module")
def undisturbed(rows_file, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    return run_recipe(recipe_for(rows_file), store).manifests["chunks"]


def test_shards_do_not_change_the_rows(rows_file, tmp_path, undisturbed):
    assert len(undisturbed.parts) > 10
    whole = run_recipe(recipe_for(rows_file, "chunks.shard_bytes=100000000"), Store(tmp_path))
    manifest = whole.manifests["chunks"]
    assert len(manifest.parts) == 1
    assert manifest.key == undisturbed.key
    assert manifest.logical_digest == undisturbed.logical_digest


def test_second_run_does_nothing(rows_file, tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = run_recipe(recipe_for(rows_file), store).manifests["chunks"]
    monkeypatch.setattr(engine, "_one_shard", None)  # calling it would raise
    progress = Counting()
    second = run_recipe(recipe_for(rows_file), store, progress=progress).manifests["chunks"]
    assert second == first
    assert progress.calls == [("start", "chunks", 0), ("finish",)]


def test_same_content_elsewhere_is_the_same_table(rows_file, tmp_path):
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(rows_file.read_bytes())
    a, b = (run_recipe(recipe_for(p), Store(tmp_path / "s")) for p in (rows_file, copy))
    assert a.manifests["chunks"].key == b.manifests["chunks"].key


def test_after_a_failure_only_what_is_missing_is_done(
    rows_file, tmp_path, monkeypatch, undisturbed
):
    store = Store(tmp_path)
    real, done = chunk_step.shard, []

    def failing(job, index, out):
        if index == 7 and 7 not in done:
            done.append(7)
            raise OSError("the network went away")
        done.append(index)
        real(job, index, out)

    spec = STEPS["chunk"]
    monkeypatch.setitem(STEPS, "chunk", dataclasses.replace(spec, shard=failing))
    with pytest.raises(OSError, match="network"):
        run_recipe(recipe_for(rows_file), store)
    assert "chunks" not in store.names()
    assert done == [0, 1, 2, 3, 4, 5, 6, 7]
    done.clear()
    done.append(7)
    progress = Counting()
    manifest = run_recipe(recipe_for(rows_file), store, progress=progress).manifests["chunks"]
    assert done[1:] == list(range(7, len(undisturbed.parts)))
    assert progress.calls[:2] == [("start", "chunks", len(undisturbed.parts)), ("advance", 7)]
    assert manifest.logical_digest == undisturbed.logical_digest


def test_two_workers_make_the_same_rows(rows_file, tmp_path, undisturbed):
    result = run_recipe(recipe_for(rows_file), Store(tmp_path), workers=2)
    assert result.manifests["chunks"].key == undisturbed.key
    assert result.manifests["chunks"].logical_digest == undisturbed.logical_digest


def test_a_bad_row_in_a_worker_names_its_place(rows_file, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(rows_file.read_text() + '{"text": 5}\n')
    with pytest.raises(InputError, match="bad.jsonl, row 401, column text"):
        run_recipe(recipe_for(path), Store(tmp_path / "s"), workers=2)


def test_a_worker_that_dies_is_an_error_with_advice(rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "run_shard", _die)
    with pytest.raises(PruneryError, match="worker process of step `chunk` died"):
        run_recipe(recipe_for(rows_file), Store(tmp_path), workers=2)


def _die(job, shard):
    os.kill(os.getpid(), signal.SIGKILL)


PROGRAM = """
import sys
from pathlib import Path
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store
recipe = parse_recipe(Path(sys.argv[1]).read_text())
print("begin", flush=True)
run_recipe(recipe, Store(sys.argv[2]))
"""


def test_killed_at_any_moment_and_run_again_gives_the_same_rows(rows_file, tmp_path, undisturbed):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=rows_file))
    draw = random.Random(11)
    store = Store(tmp_path / "store")
    killed = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(recipe), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if "chunks" in store.names():
            break
        assert store.tables() == []
    assert killed
    manifest = run_recipe(recipe_for(rows_file), store).manifests["chunks"]
    assert manifest.key == undisturbed.key
    assert manifest.logical_digest == undisturbed.logical_digest
    assert store.verify() == []


@pytest.fixture
def bad_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = ['{"text": "Good row."}'] * 8 + ['{"text": 5}', "{"]
    path.write_text("\n".join(lines))
    return path


def test_bad_rows_stop_the_run_where_none_are_allowed(bad_rows, tmp_path):
    store = Store(tmp_path / "s")
    with pytest.raises(InputError, match=r"bad.jsonl, row 9, column text.*bad_rows"):
        run_recipe(recipe_for(bad_rows), store)
    assert store.tables() == []


def test_bad_rows_beyond_the_share_stop_the_run(bad_rows, tmp_path):
    store = Store(tmp_path / "s")
    with pytest.raises(InputError, match=r"rejected 2 of 10 rows, more than the share of 0.1"):
        run_recipe(recipe_for(bad_rows, "bad_rows=0.1"), store)
    assert store.tables() == []


def test_bad_rows_within_the_share_are_kept_aside(bad_rows, tmp_path):
    store = Store(tmp_path / "s")
    manifest = run_recipe(recipe_for(bad_rows, "bad_rows=0.25"), store).manifests["chunks"]
    assert (manifest.rows, manifest.rejected) == (8, 2)
    reasons = store.table("chunks").rejects().column("reason").to_pylist()
    assert [reason.split(":")[0] for reason in reasons] == [
        "bad.jsonl, row 9, column text",
        "bad.jsonl, row 10",
    ]
    # The table exists now, and a recipe that allows no bad row does not take it.
    with pytest.raises(InputError, match="rejected 2 of 10"):
        run_recipe(recipe_for(bad_rows), store)


def test_a_step_is_a_function_of_options_inputs_and_context(rows_file, tmp_path):
    options = chunk_step.ChunkOptions(path=str(rows_file), max_tokens=32)
    store = Store(tmp_path)
    manifest = STEPS["chunk"](options, {}, StepContext(store=store, name="mine"))
    assert store.names() == {"mine": manifest.key}
    assert manifest.kept == manifest.rows == 400


def test_recipe_seed_enters_the_key(rows_file, tmp_path):
    store = Store(tmp_path)
    keys = {
        run_recipe(recipe_for(rows_file, f"seed={seed}"), store).manifests["chunks"].key
        for seed in (0, 1)
    }
    assert len(keys) == 2
