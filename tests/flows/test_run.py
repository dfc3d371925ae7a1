"""The flow gives the rows of the plain run: on a server, on an ephemeral one, and after retries."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest

from prunery.errors import InputError, PruneryError
from prunery.flows.run import run_flow
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from ..tiny_models import tiny_encoder

CHUNKS = """
name: Only Chunks
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, shard_bytes: 500}}
  questions: {{step: questions, path: "{questions}"}}
"""

VECTORS = """
name: vectors
steps:
  chunks: {{step: chunk, path: "{path}", max_tokens: 32, tokenizer: "{encoder}"}}
  vectors: {{step: embed, inputs: {{chunks: chunks}}, encoder: "{encoder}"}}
"""


def digests(result):
    return {name: (m.key, m.logical_digest) for name, m in result.manifests.items()}


@pytest.fixture
def chunks_only(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "Row {i}. It ends."}}\n' for i in range(100)))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What ends?", "answers": ["It"]}\n')
    return CHUNKS.format(path=rows, questions=questions)


def test_flow_gives_the_rows_of_the_plain_run(server, small, tmp_path):
    plain = run_recipe(small(), Store(tmp_path / "plain"), threads=1)
    flow = run_flow(small(), Store(tmp_path / "flow"), threads=1)
    assert digests(flow) == digests(plain)
    assert flow.report.is_file()
    assert flow.lines()[-1] == f"report: {flow.report}"
    # And again: nothing is done twice, whoever did it first.
    again = run_flow(small(), Store(tmp_path / "plain"), threads=1)
    assert {n: m.created for n, m in again.manifests.items()} == {
        n: m.created for n, m in plain.manifests.items()
    }
    _check_artifacts(flow)


def test_a_flow_over_grown_rows_scores_the_new_ones_alone(server, tmp_path):
    path, store = tmp_path / "rows.jsonl", Store(tmp_path / "store")
    recipe = parse_recipe(VECTORS.format(path=path, encoder=tiny_encoder(tmp_path)))
    keys = []
    for rows in (30, 40):
        path.write_text("".join(f'{{"text": "Row {i} says {i * i}."}}\n' for i in range(rows)))
        made = run_flow(recipe, store, threads=1).manifests["vectors"]
        keys.append(made.key)
    assert made.rows == 40 and made.notes["reused"] == {keys[0]: 30}


def _check_artifacts(flow):
    import json

    from prefect.artifacts import Artifact

    table = Artifact.get("small-steps")
    rows = {row["step"]: row for row in json.loads(table.data)}
    assert rows.keys() == flow.manifests.keys()
    for name, manifest in flow.manifests.items():
        assert rows[name]["rows"] == manifest.rows
        assert rows[name]["kept"] == manifest.kept
        assert rows[name]["dropped"] == sum(manifest.dropped.values())
    assert "report.html" in Artifact.get("small-report").data


def test_a_task_that_is_retried_gives_the_same_rows(server, chunks_only, tmp_path, monkeypatch):
    from prunery.flows import recipe_flow

    monkeypatch.setattr(recipe_flow.run_step, "retry_delay_seconds", [0, 0])
    recipe = parse_recipe(chunks_only)
    plain = run_recipe(recipe, Store(tmp_path / "plain"))
    spec, made = STEPS["chunk"], []

    def failing(job, index, out):
        made.append(index)
        if made.count(3) == 1 and index == 3:
            raise OSError("the disk was away for a moment")
        spec.shard(job, index, out)

    monkeypatch.setitem(STEPS, "chunk", dataclasses.replace(spec, shard=failing))
    flow = run_flow(recipe, Store(tmp_path / "flow"))
    assert digests(flow) == digests(plain)
    shards = len(plain.manifests["chunks"].parts)
    assert made == [0, 1, 2, 3, *range(3, shards)]


def test_a_bad_row_is_not_retried(server, chunks_only, tmp_path, monkeypatch):
    from prunery.flows import recipe_flow

    monkeypatch.setattr(recipe_flow.run_step, "retry_delay_seconds", [0, 0])
    spec, calls = STEPS["chunk"], []

    def failing(job, index, out):
        calls.append(index)
        raise InputError("row 7 is bad")

    monkeypatch.setitem(STEPS, "chunk", dataclasses.replace(spec, shard=failing))
    with pytest.raises(InputError, match="row 7 is bad"):
        run_flow(parse_recipe(chunks_only), Store(tmp_path / "s"))
    assert calls == [0]


def test_progress_of_the_caller_hears_of_the_steps(server, chunks_only, tmp_path):
    heard = []

    class Progress:
        def start(self, name, total):
            heard.append(name)

        def advance(self, n=1):
            pass

        def finish(self):
            pass

    run_flow(parse_recipe(chunks_only), Store(tmp_path / "s"), progress=Progress())
    assert heard == ["chunks", "questions"]


PROGRAM = """
import sys
from pathlib import Path
from prunery.flows.run import run_flow
from prunery.pipelines.recipe import parse_recipe
from prunery.storage import Store
if __name__ == "__main__":
    result = run_flow(parse_recipe(Path(sys.argv[1]).read_text()), sys.argv[2])
    for name, manifest in result.manifests.items():
        print(name, manifest.key, manifest.logical_digest)
"""


def _elsewhere(tmp_path, chunks_only, **more):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(chunks_only)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    env = {**kept, "PREFECT_HOME": str(tmp_path / "prefect"), "HOME": str(tmp_path), **more}
    return subprocess.run(
        [sys.executable, str(program), str(recipe), str(tmp_path / "store")],
        env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_ephemeral_server_gives_the_rows_of_the_plain_run(chunks_only, tmp_path):
    done = _elsewhere(tmp_path, chunks_only)
    assert done.returncode == 0, done.stderr
    plain = run_recipe(parse_recipe(chunks_only), Store(tmp_path / "plain"))
    expected = [f"{n} {m.key} {m.logical_digest}" for n, m in plain.manifests.items()]
    assert done.stdout.splitlines() == expected
    # Plain enough for a terminal: Prefect says nothing.
    assert done.stderr == ""


def test_a_server_that_does_not_answer_is_said(chunks_only, tmp_path, monkeypatch):
    done = _elsewhere(
        tmp_path, chunks_only, PREFECT_API_URL="http://127.0.0.1:9/api",
        PREFECT_CLIENT_MAX_RETRIES="0",
    )  # fmt: skip
    assert done.returncode != 0
    assert "Prefect's server does not answer" in done.stderr
    assert "--plain" in done.stderr


def test_importing_the_runner_does_not_import_prefect():
    code = (
        "import sys, prunery.flows.run, prunery.flows.deployments;"
        "sys.exit('prefect' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pruneryerror_is_what_callers_catch():
    assert issubclass(InputError, PruneryError)


KILLED = """
import sys
from pathlib import Path
from prunery.flows.run import run_flow
from prunery.pipelines.recipe import parse_recipe

class Progress:
    def start(self, name, total): pass
    def advance(self, n=1):
        print("shard" * n, flush=True)
    def finish(self): pass

if __name__ == "__main__":
    run_flow(parse_recipe(Path(sys.argv[1]).read_text()), sys.argv[2], progress=Progress())
"""


def test_a_killed_flow_goes_on_where_it_was(server, chunks_only, tmp_path):
    from prefect.settings import PREFECT_API_URL

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "Row {i}. It ends."}}\n' for i in range(2000)))
    recipe, program = tmp_path / "recipe.yaml", tmp_path / "killed.py"
    recipe.write_text(chunks_only)
    program.write_text(KILLED)
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    with subprocess.Popen(
        [sys.executable, str(program), str(recipe), str(tmp_path / "store")],
        env=env, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        done = sum(line == "shard\n" for line in itertools.islice(process.stdout, 12))
        process.kill()
    store, again = Store(tmp_path / "store"), []
    assert "chunks" not in store.names()

    class Progress:
        def start(self, name, total):
            again.append([name, total, 0])

        def advance(self, n=1):
            again[-1][2] = again[-1][2] or n  # the first call says what was there

        def finish(self):
            pass

    result = run_flow(parse_recipe(chunks_only), store, progress=Progress())
    assert done >= 10
    assert again[0][2] >= done
    assert again[0][1] > again[0][2]
    assert digests(result) == digests(
        run_recipe(parse_recipe(chunks_only), Store(tmp_path / "plain"))
    )
    assert store.verify() == []
