"""A Prefect server of its own process, and a process that serves a small recipe on it."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx

RECIPE = """
name: tiny
about: A few sentences.
steps:
  chunks: {step: chunk, path: docs, max_tokens: 40}
"""
SERVE = """
import sys
from prunery.flows.deployments import serve_recipe
serve_recipe(sys.argv[1], sys.argv[2], name="tiny")
"""


def _environment(folder, url):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **kept,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "OMP_NUM_THREADS": "1",
    }


def _free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def _stop(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _started(process, log, done, seconds=180):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.3)


@contextmanager
def prefect_server(folder):
    """The URL of a fresh server's API."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no-ui"],
            env=_environment(folder, url), stdout=out, stderr=out,
        )  # fmt: skip

    def healthy():
        try:
            return httpx.get(f"{url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    try:
        _started(process, log, healthy)
        yield url
    finally:
        _stop(process)


@contextmanager
def served_recipe(folder, url, store):
    """A process that serves the deployment `tiny`."""
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("One sentence. And one more.")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    program, log = folder / "serve.py", folder / "serve.log"
    program.write_text(SERVE)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program), str(recipe), str(store)],
            env=_environment(folder, url), stdout=out, stderr=out, cwd=folder,
        )  # fmt: skip

    def deployed():
        body = {"deployments": {"name": {"any_": ["tiny"]}}}
        return httpx.post(f"{url}/deployments/filter", json=body, timeout=20).json()

    try:
        _started(process, log, deployed)
        yield recipe
    finally:
        _stop(process)
