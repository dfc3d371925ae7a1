"""What a run says of a pruned data set and of its students."""

import json

import pytest

from prunery.pipelines.engine import StepContext
from prunery.pipelines.run import RunResult
from prunery.pipelines.steps.report_dataset import SPEC, ReportDatasetOptions
from prunery.storage import Store

from . import dataset_pages as made


@pytest.fixture
def result(tmp_path):
    """A function that makes the result of a run with those students (None: no such step)."""

    def make(students):
        store = Store(tmp_path / "store")
        data = made.data(store)
        decision = made.decision(store, data)
        keys = {"data": data, "prune": decision}
        if students is not None:
            keys["students"] = made.students(store, decision, students)
        inputs = {"data": data, "decision": decision}
        report = SPEC(ReportDatasetOptions(), inputs, StepContext(store=store, name="report"))
        keys["report"] = report.key
        return RunResult("r", store, {name: store.manifest(key) for name, key in keys.items()})

    return make


def test_the_lines_of_a_run(result):
    done = result(made.grid_rows())
    lines = done.lines()
    assert lines[4:] == [
        "",
        "prune: 8 -> 4 rows (50% removed), 2 of 3 classes left",
        "",
        "students: 25% chosen + distilled 0.836 ± 0.037, random + distilled 0.736 ± 0.027,"
        " full 0.910 ± 0.025",
        "students: 50% chosen + distilled 0.811 ± 0.037, random + distilled 0.811 ± 0.027,"
        " full 0.910 ± 0.025",
        "",
        f"report: {done.report}",
    ]
    assert done.report.name.endswith("report.html")


def test_a_run_without_students(result):
    done = result(None)
    assert done.students() == {}
    assert not any(line.startswith("students") for line in done.lines())


def test_the_same_as_plain_values(result):
    told = json.loads(json.dumps(result(made.grid_rows(seeds=1)).as_json()))
    assert told["selections"] == {
        "prune": {"rows": 8, "rows_kept": 4, "classes": 3, "classes_left": 2}
    }
    first = told["students"]["students"][0]
    assert first == {
        "fraction": 0.25,
        "selection": "random",
        "distilled": False,
        "accuracy": pytest.approx(0.675),
        "interval": None,
        "seeds": 1,
    }
    assert told["report"].endswith("report.html")


def test_nothing_decided(tmp_path):
    store = Store(tmp_path / "store")
    key = made.decision(store, made.data(store), [])
    done = RunResult("r", store, {"prune": store.manifest(key)})
    assert done.lines()[-1] == "prune: 0 -> 0 rows (0% removed), 0 of 0 classes left"
