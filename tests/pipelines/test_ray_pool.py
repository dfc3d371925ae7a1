"""Shards on a real Ray cluster of this machine: the same rows, and nothing lost with an actor."""

import contextlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prunery.errors import InputError, PruneryError
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.workers import Workers
from prunery.storage import Store

from .chat_server import reply, serving
from .test_silver_labels import record

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

CHUNKS = """
name: chunks
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, shard_bytes: 2000}}
"""
VECTORS = """
name: vectors
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, shard_bytes: 800, tokenizer: "{encoder}"}}
  vectors: {{step: embed, inputs: {{chunks: chunks}}, encoder: "{encoder}", batch_size: 8}}
"""
SILVER = """
name: silver
steps:
  silver:
    step: label_silver
    rows: ["{path}"]
    shard_rows: 1
    endpoint: {{base_url: "{url}", model: m, max_cost: null}}
"""


@pytest.fixture(scope="module")
def cluster():
    """One cluster for the tests of this file; starting one takes seconds."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except (OSError, RuntimeError, ConnectionError) as error:
        pytest.skip(f"no Ray cluster can start here: {error}")
    yield Workers("ray", 2, threads=1)
    ray.shutdown()


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "Row {i} says {i * i}. It ends."}}\n' for i in range(300)))
    return path


def test_rows_are_those_of_every_other_engine(cluster, lines, tmp_path):
    recipe = parse_recipe(CHUNKS.format(path=lines))
    here = run_recipe(recipe, Store(tmp_path / "here")).manifests["chunks"]
    assert len(here.parts) > 5
    for name, workers in (("ray", cluster), ("processes", 2)):
        made = run_recipe(recipe, Store(tmp_path / name), workers=workers).manifests["chunks"]
        assert (made.key, made.logical_digest) == (here.key, here.logical_digest)


def test_over_grown_rows_actors_score_the_new_ones_alone(cluster, models, tmp_path):
    path = tmp_path / "grown.jsonl"
    recipe = parse_recipe(VECTORS.format(path=path, encoder=models[0]))
    made = {}
    for engine, workers in (("ray", cluster), ("here", 1)):
        store = Store(tmp_path / engine)
        for rows in (60, 80):
            lines = (f'{{"text": "Row {i} says {i * i}."}}\n' for i in range(rows))
            path.write_text("".join(lines))
            result = run_recipe(recipe, store, workers=workers, threads=1)
        made[engine] = result.manifests["vectors"]
    assert sum(made["ray"].notes["reused"].values()) == 60
    assert made["ray"].logical_digest == made["here"].logical_digest
    assert made["ray"].notes["reused"] == made["here"].notes["reused"]


def test_a_bad_row_on_an_actor_is_the_error_it_is_here(cluster, lines, tmp_path):
    lines.write_text(lines.read_text() + '{"text": 5}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, row 301, column text"):
        run_recipe(parse_recipe(CHUNKS.format(path=lines)), Store(tmp_path / "s"), workers=cluster)


def test_a_killed_actor_loses_nothing_and_repeats_its_shard(cluster, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(8)))
    held, go_on = threading.Event(), threading.Event()

    def answer(asked, before):
        if "Ann 2?" in asked.user and not before:
            held.set()
            go_on.wait(120)
        return reply("In May [2].")

    with serving(answer) as server, ThreadPoolExecutor(1) as thread:
        recipe = parse_recipe(SILVER.format(path=path, url=server.url))
        store = Store(tmp_path / "store")
        running = thread.submit(run_recipe, recipe, store, workers=cluster)
        try:
            assert held.wait(120)
            os.kill(_only_busy_actor(server), signal.SIGKILL)
            running.result(120)
        finally:
            go_on.set()
    assert store.manifest("silver").rows == 8
    assert len(server.asked) == 9  # eight shards, and the one that was under way once more
    assert store.verify() == []


def _only_busy_actor(server):
    """Process id of the actor that is still at its shard when all others are done."""
    import psutil

    until = time.monotonic() + 60
    while time.monotonic() < until:
        busy = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                busy += [process.pid] * ("ray::_Worker.run" in process.cmdline()[:1])
        if len(server.asked) == 8 and len(busy) == 1:
            return busy[0]
        time.sleep(0.1)
    pytest.fail(f"expected one busy actor and 8 requests; found {busy}, {len(server.asked)}")


def test_workers_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="engine among processes, ray"):
        Workers("dask")
    with pytest.raises(InputError, match="only to the engine `ray`"):
        Workers(ray_address="auto")


def test_a_cluster_that_does_not_answer_is_said(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PruneryError, match=r"expected a Ray cluster at `127.*ray start --head"):
        run_recipe(
            parse_recipe(CHUNKS.format(path=lines)),
            Store(tmp_path / "s"),
            workers=Workers("ray", 2, ray_address="127.0.0.1:1"),
        )
