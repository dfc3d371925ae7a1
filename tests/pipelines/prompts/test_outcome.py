"""What a run says of a prompt search, from made tables."""

import json

import pytest

from prunery.pipelines.engine import StepContext
from prunery.pipelines.prompts.outcome import outcome, outcome_lines
from prunery.pipelines.run import RunResult
from prunery.pipelines.steps.report_prompts import SPEC, ReportPromptsOptions
from prunery.storage import Store

from . import pages as made


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_the_prompt_taken_and_what_it_cost(store):
    keys = made.everything(store)
    found = outcome(store, store.manifest(keys["verdict"]))
    assert (found["contender"], found["prompt"]) == ("found", made.FOUND)
    assert found["steps"] == {
        "influence": {"queries": 28, "tokens": 196},
        "search": {"queries": 16, "tokens": 144},
        "control": {"queries": 8, "tokens": 72},
        "verdict": {"queries": 32, "tokens": 352},
    }
    assert (found["queries"], found["tokens"]) == (84, 764)
    assert outcome_lines("test", found) == [
        "test: the found prompt is taken: 'great <b>bold</b>'",
        f"  {made.WINS}",
        "  test accuracy 86.5% ± 2.0 (s.e., 4 rows); empty 74.0% ± 2.0, manual 79.0% ± 2.0,"
        " control 69.0% ± 2.0",
        "  84 queries, 764 tokens",
    ]


def test_the_empty_prompt_and_no_test_rows(store):
    rows = [row for row in made.verdict_rows("empty", "why") if row["part"] == "validation"]
    key = made.verdict(store, [], rows)
    said = outcome_lines("v", outcome(store, store.manifest(key)))
    assert said[0] == "v: the empty prompt is taken: no prompt at all"
    assert said[2].startswith("  validation accuracy 75.0% ± 2.0 (s.e., 4 rows); found 87.5%")


def test_an_empty_verdict(store):
    key = made.verdict(store, [], [])
    found = outcome(store, store.manifest(key))
    assert outcome_lines("v", found) == ["v: no prompt was taken"]


def test_a_run_tells_it_and_knows_the_page(store):
    keys = made.everything(store)
    page = SPEC(ReportPromptsOptions(), keys, StepContext(store=store, name="report"))
    manifests = {name: store.manifest(key) for name, key in keys.items()}
    result = RunResult("prompt", store, manifests | {"report": page})
    lines = result.lines()
    assert "verdict: the found prompt is taken: 'great <b>bold</b>'" in lines
    assert lines[-1] == f"report: {result.report}"
    told = result.as_json()
    assert told["prompts"]["verdict"]["queries"] == 84
    json.dumps(told)
