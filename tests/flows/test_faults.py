"""A flow's process and Prefect's server killed in the middle of a run: run again, nothing lost."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

RECIPE = """
name: slow
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, shard_bytes: 500}}
"""
PROGRAM = """
import dataclasses, sys, time
from pathlib import Path
from prunery.flows.run import run_flow
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.steps import STEPS
_, recipe, store, log, seconds = sys.argv
spec = STEPS["chunk"]
def slow(job, index, out):
    spec.shard(job, index, out)
    with open(log, "a") as file:
        file.write(f"{index}\\n")
    time.sleep(float(seconds))
STEPS["chunk"] = dataclasses.replace(spec, shard=slow)
run_flow(parse_recipe(Path(recipe).read_text()), store)
"""


class Stage:
    """A recipe of several shards, a Prefect server, and processes that run the one on the other."""

    def __init__(self, folder):
        self.folder = folder
        rows = folder / "rows.jsonl"
        rows.write_text("".join(f'{{"text": "Row {i}. It ends."}}\n' for i in range(100)))
        self.text = RECIPE.format(path=rows)
        (folder / "recipe.yaml").write_text(self.text)
        (folder / "program.py").write_text(PROGRAM)
        kept = {name: value for name, value in os.environ.items() if name[:8] != "PREFECT_"}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.env = {
            **kept,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLIENT_MAX_RETRIES": "2",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = []

    def server(self):
        command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
        process = self._start([*command, "--host", "127.0.0.1", "--port", str(self.port)])
        end = time.monotonic() + 180
        while not self._healthy():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.3)
        return process

    def _healthy(self):
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def flow(self, store, log, seconds):
        program = [sys.executable, str(self.folder / "program.py")]
        return self._start([*program, self.folder / "recipe.yaml", store, log, str(seconds)])

    def _start(self, command):
        process = subprocess.Popen(
            [str(part) for part in command],
            env=self.env, cwd=self.folder, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if "program" in str(command) else
            subprocess.DEVNULL,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.fixture
def stage(tmp_path):
    made = Stage(tmp_path)
    yield made
    made.close()


def done(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def until_shards(log, count, process):
    end = time.monotonic() + 200
    while len(done(log)) < count:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def finished(process):
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error[-3000:]


def test_the_flows_process_and_then_the_server_are_killed(stage, tmp_path):
    plain = run_recipe(parse_recipe(stage.text), Store(tmp_path / "plain")).manifests["chunks"]
    shards = len(plain.parts)
    assert shards >= 4
    server = stage.server()
    store, log = Store(tmp_path / "store"), tmp_path / "log"

    flow = stage.flow(store.uri, log, 0.5)
    until_shards(log, 2, flow)
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    assert store.tables() == []  # nobody sees a part of it
    assert len(done(log)) < shards

    # Another run goes on from the journal; its server dies under it.
    flow = stage.flow(store.uri, log, 0.5)
    until_shards(log, 3, flow)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    error = flow.communicate(timeout=250)[1]
    assert store.tables() == [] or store.manifest("chunks").logical_digest == plain.logical_digest
    if flow.returncode:
        assert "Prefect" in error

    stage.server()
    finished(stage.flow(store.uri, log, 0))
    assert store.manifest("chunks").logical_digest == plain.logical_digest
    assert store.verify() == []
    made = done(log)
    assert set(made) == set(range(shards))
    assert len(made) - shards <= 2  # at most the shard under way at each kill
