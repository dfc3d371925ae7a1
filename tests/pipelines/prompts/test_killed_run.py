"""A run that is killed in the middle of a step goes on with the next query and pays none twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from prunery.errors import PruneryWarning
from prunery.pipelines.recipe import load_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

from ..chat_server import classic, serving

CONCURRENCY = 4
RECIPE = """
name: paid
steps:
  data: {{step: read_dataset, path: rows.jsonl, holdout: 0.4}}
  task:
    step: prompt_task
    inputs: {{data: data}}
    black_box: endpoint
    base_url: {url}
    model: m
    manual: is it
    shots: 3
    validation_shots: 3
  vocabulary: {{step: prompt_vocabulary, inputs: {{task: task}}, source: file, path: words.txt}}
  influence:
    step: prompt_influence
    inputs: {{task: task, words: vocabulary}}
    halving: 1
    concurrency: 4
    max_cost: 1
    input_price: 1
    output_price: 1
  prune: {{step: prune_prompts, inputs: {{influence: influence}}, count: 3}}
  search:
    step: search_prompts
    inputs: {{task: task, words: prune}}
    length: 3
    prompts: 30
    population: 10
    mutants: 5
    crossovers: 5
    concurrency: 4
    max_queries: 150
  test: {{step: test_prompts, inputs: {{task: task, search: search}}, concurrency: 4}}
"""


def honest(asked, before):
    """A probability of "yes" from the text's digest, a moment later."""
    p = 0.05 + hashlib.sha256(asked.user.encode()).digest()[0] / 320
    return classic({" yes": math.log(p), " no": math.log(1 - p)}, delay=0.004)


@pytest.fixture
def folder(tmp_path):
    rows = [{"text": f"{name} row {i}", "label": name} for i in range(30) for name in ("yes", "no")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.txt").write_text("\n".join(f"word{i}" for i in range(12)))
    return tmp_path


def killed_after(folder, server, count):
    """Start the run in a process of its own and kill it once the server was asked so often."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prunery.cli", "run", str(folder / "paid.yaml"), "--plain",
         "--store", str(folder / "store")],
        env=os.environ | {"PRUNERY_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while len(server.asked) < count:
        assert process.poll() is None, process.stderr.read().decode()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return {manifest.name for manifest in Store(folder / "store").tables()}


def test_a_killed_run_pays_for_nothing_twice(folder, monkeypatch):
    with serving(honest) as server:
        (folder / "paid.yaml").write_text(RECIPE.format(url=server.url))
        loaded = load_recipe(folder / "paid.yaml")
        monkeypatch.setenv("PRUNERY_CACHE", str(folder / "other"))
        whole = run_recipe(loaded, Store(folder / "other-store"))
        texts = Counter(asked.user for asked in server.asked)
        assert set(texts.values()) == {1}  # not one text twice, over all steps of the run
        server.asked.clear()

        assert "influence" not in killed_after(folder, server, 20)
        assert "influence" not in killed_after(folder, server, 45)
        done = killed_after(folder, server, 160)
        assert {"influence", "prune"} <= done
        assert "search" not in done
        monkeypatch.setenv("PRUNERY_CACHE", str(folder / "cache"))
        again = run_recipe(loaded, Store(folder / "store"))

    for name, manifest in whole.manifests.items():
        assert again.manifests[name].logical_digest == manifest.logical_digest, name
    asked = Counter(one.user for one in server.asked)
    assert set(asked) == set(texts)
    twice = sum(count - 1 for count in asked.values())
    assert twice <= 3 * CONCURRENCY  # what was under way at each of three kills


def test_classes_that_an_endpoint_leaves_out_are_told(folder, monkeypatch):
    """Never a made-up score in silence: bounds and blind replies are counted and said."""

    def silent_on_no(asked, before):
        if "word1" in asked.user:
            return classic({" maybe": -0.5, " so": -1.5})
        return classic({" yes": -0.5, " so": -1.5})

    monkeypatch.setenv("PRUNERY_CACHE", str(folder / "cache"))
    with serving(silent_on_no) as server:
        (folder / "paid.yaml").write_text(RECIPE.format(url=server.url))
        with pytest.warns(PruneryWarning, match=r"held no class at all.*top_logprobs"):
            made = run_recipe(load_recipe(folder / "paid.yaml"), Store(folder / "store"))
    rows = made.store.table(made.manifests["influence"].key).to_table().to_pylist()
    blind = next(row for row in rows if row["text"] == "word1")
    assert np.allclose(blind["log_probability"], np.log(0.5))
