"""The benchmark of prompt search: its rows, a run on a made set, and how it compares."""

import argparse
import gzip
import hashlib
import json
import sys

import numpy as np
import pytest

MODULES = (
    "prompt_quality_report",
    "prompt_quality_grid",
    "prompt_quality_data",
    "prompt_quality",
    "sections",
)
WORDS = [f"word{n}" for n in range(12)]


@pytest.fixture
def bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import prompt_quality

    return prompt_quality


@pytest.fixture
def data(bench):
    return sys.modules["prompt_quality_data"]


@pytest.fixture
def report(bench):
    return sys.modules["prompt_quality_report"]


def write(folder, name, rows, ending="\n"):
    raw = ending.join(["sentence\tlabel", *(f"{text}\t{code}" for text, code in rows), ""]).encode()
    packed = gzip.compress(raw) if name.endswith(".gz") else raw
    (folder / name).write_bytes(packed)


@pytest.fixture
def folder(tmp_path):
    for task in ("sst-2", "subj"):
        for seed in (100, 13):
            train = [(f"{task} {seed} train {n}", n % 2) for n in range(8)]
            write(tmp_path, f"{task}.16-{seed}.train.tsv", train)
            dev = train if task == "subj" else [(f"{task} {seed} dev {n}", n % 2) for n in range(8)]
            write(tmp_path, f"{task}.16-{seed}.dev.tsv", dev)
        write(tmp_path, f"{task}.test.tsv.gz", [(f"{task} test {n}", n % 2) for n in range(10)])
    return tmp_path


class Hashed:
    """An encoder whose vectors are drawn from a digest of the text."""

    def __init__(self):
        self.encoded = 0

    def encode(self, texts):
        self.encoded += len(texts)
        made = np.stack([self._vector(text) for text in texts])
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    @staticmethod
    def _vector(text):
        digest = hashlib.sha256(text.encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        return np.random.default_rng(seed).normal(size=8).astype(np.float32)

    def count(self, texts):
        return np.array([len(text.split()) + 2 for text in texts], np.int64)


# -- rows ------------------------------------------------------------------------------------------


def test_lines_are_read_as_they_are(data, tmp_path):
    write(tmp_path, "a.tsv", [('"one" two', 1), (" ", 0), ("three", 0)], ending="\r\n")
    assert data.read_rows(tmp_path / "a.tsv") == [('"one" two', 1), ("three", 0)]
    (tmp_path / "b.tsv").write_text("text\tlabel\nfine\t1\nbroken\n")
    with pytest.raises(ValueError, match=r"b\.tsv, line 3: expected text, tab and code"):
        data.read_rows(tmp_path / "b.tsv")


def test_no_text_stands_in_two_parts(data, folder):
    train = [(f"sst-2 100 train {n}", n % 2) for n in range(8)]
    write(folder, "sst-2.16-100.dev.tsv", [*train[:2], ("judge me", 1), ("judge  ME", 0)])
    tested = [("SST-2 100 train 3", 0), ("judge me", 0), ("new", 1), ("new", 1)]
    write(folder, "sst-2.test.tsv.gz", tested)
    made = data.parts_of("sst-2", 100, folder)
    assert made["validation"].texts == ["judge me"]
    assert made["test"].texts == ["new"]
    assert made["train"].shot.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert made["train"].labels.tolist() == [0, 1] * 4


def test_rows_to_judge_with_come_from_elsewhere_where_the_set_has_none(data, folder):
    other = [("subj 100 train 0", 0), ("subj test 1", 1), ("other 0", 0), ("other 1", 1)]
    write(folder, "subj.16-13.train.tsv", other)
    made = data.parts_of("subj", 100, folder, seeds=(100, 13))
    assert made["validation"].texts == ["other 0", "other 1"]
    assert len(made["test"].texts) == 10


# -- a run -----------------------------------------------------------------------------------------


@pytest.fixture
def given(bench, data, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SEEDS", (100, 13))
    out = tmp_path / "out"
    out.mkdir()
    told = {"words": WORDS, "entries": 40, "fit": 30}
    (out / "vocabulary.json").write_text(json.dumps(told))
    return argparse.Namespace(
        tasks=["sst-2", "subj"], seeds=[100, 13], searches=list(bench.SEARCHES),
        longer=["genetic"], clusters=12, keep=0.25, prompts=30, length=2, extras=True,
        dtype="bfloat16", data=folder, out=out,
    )  # fmt: skip


def test_a_run_its_resumption_and_its_report(bench, data, report, given, tmp_path):
    encoder = Hashed()
    words = data.vocabulary(encoder, 12, given.out / "vocabulary.json")
    bench.run(given, encoder, words)
    path = given.out / "cells.jsonl"
    lines = path.read_text().splitlines()
    rows = {(row["task"], row["seed"], row["name"]): row for row in map(json.loads, lines)}
    # The influences, four searches in three spaces, five other spaces; by task and seed.
    assert len(rows) == len(lines) == 4 * (1 + 12 + 5)
    told = rows["sst-2", 100, "influence"]
    assert (told["kept"], told["queries"]) == (3, 8 * (12 + 1))
    assert told["queries_halved"] == told["queries_halved_planned"] <= told["queries"]
    assert rows["sst-2", 100, "pruned/greedy/2"]["asked"] == 2 * 3
    assert rows["subj", 13, "full/genetic/2"]["asked"] == 30 + 13
    assert rows["subj", 13, "full/random/2"]["asked"] == 30
    _the_best_is_the_best(bench, data, given, encoder, rows["sst-2", 13, "full/greedy/2"])

    # Stopped in the middle: what is missing is made again, the same.
    path.write_text("\n".join(lines[:20]) + "\n")
    bench.run(given, encoder, words)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in again]
    key = lambda row: (row["task"], row["seed"], row["name"])  # noqa: E731
    assert sorted(timeless, key=key) == sorted(
        ({k: v for k, v in row.items() if k != "seconds"} for row in rows.values()), key=key
    )

    bench.judge_all(given, encoder)
    bench.judge_all(given, encoder)
    judged = report.read_lines(given.out / "judged.jsonl")
    assert len(judged) == 4 * 17
    for row in judged:
        assert row["test"]["found"] == row["bfloat16"]  # one encoder here
        assert row["chosen"]["accuracy"] in ("found", row["rival"], "empty", "manual")
    report.write_report(given.out, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    for heading in ("Equal search: 30 prompts", "Equal total: 43 prompts", "### The guard"):
        assert heading in text
    assert "nan" not in text
    assert (
        len(json.loads((tmp_path / "results" / "prompt_quality.json").read_text())["cells"]) == 72
    )


def _the_best_is_the_best(bench, data, given, encoder, row):
    """The last mark, from the answers themselves."""
    box = data.open_boxes(["sst-2"], encoder)["sst-2"]
    parts = data.parts_of("sst-2", 13, given.data)
    best = row["marks"][-1]
    gold = np.arange(8), parts["train"].labels
    reward = box.label_logprobs([best["prompt"]], parts["train"].texts)[0][gold].mean()
    assert best["reward"] == pytest.approx(float(reward), abs=1e-5)
    singles = box.label_logprobs(WORDS, parts["train"].texts)[:, *gold].mean(axis=1)
    assert best["reward"] >= singles.max() - 1e-5
    answers = box.label_logprobs([best["prompt"]], parts["test"].texts)[0]
    right = (answers.argmax(axis=1) == parts["test"].labels).mean()
    assert best["test"] == pytest.approx(right)


# -- comparisons -----------------------------------------------------------------------------------


def grid_of(report, values, **settings):
    rows = [
        {
            "task": task, "seed": seed, "name": f"{space}/genetic/5", "asked": 100,
            "marks": [{"prompts": 50, "test": test - 0.1, "reward": -1.0},
                      {"prompts": 100, "test": test, "reward": -0.5}],
            "trace": [[1, -2.0], [40, -1.0], [90, -0.5]],
        }
        for (space, task, seed), test in values.items()
    ]  # fmt: skip
    return report.Grid(rows, [], {"length": 5, "longer": ["genetic"], **settings})


def test_differences_are_paired_by_task_and_seed(report):
    values = {
        ("pruned", "mr", 1): 0.9, ("pruned", "mr", 2): 0.5, ("pruned", "cr", 1): 0.7,
        ("random", "mr", 1): 0.8, ("random", "mr", 2): 0.3, ("random", "cr", 2): 0.1,
    }  # fmt: skip
    grid = grid_of(report, values)
    made = report.paired(grid, "pruned/genetic/5", "random/genetic/5", "test", 100, 100)
    # Of 0.1 and 0.2 the mean is 0.15, the deviation 0.0707, and 12.706 the quantile.
    assert (made.n, made.mean) == (2, pytest.approx(0.15))
    assert made.half == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert report.verdict(made) == "ties"
    earlier = report.paired(grid, "pruned/genetic/5", "random/genetic/5", "test", 50, 100)
    assert earlier.mean == pytest.approx(0.05)
    assert report.verdict(report.Figure(0.2, 0.1, 9)) == "wins"
    assert report.verdict(report.Figure(-0.2, 0.1, 9)) == "loses"
    assert report.verdict(report.Figure(0.2, float("nan"), 1)) == "too few"


def test_prompts_until_a_reward(report):
    row = {"trace": [[1, -2.0], [40, -1.0], [90, -0.5]]}
    assert report.prompts_to(row, -1.0) == 40
    assert report.prompts_to(row, -2.5) == 1
    assert report.count(report.prompts_to(row, -0.4)) == "never"
    assert report.prompts_to(row, -0.5, 90) == 90
    assert report.count(report.prompts_to(row, -0.5, 89)) == "never"


def test_guards_by_hand(report):
    def row(found, empty, manual, by_accuracy, by_likelihood):
        return {
            "task": "mr", "seed": 1, "name": "pruned/greedy/5", "rival": "manual",
            "test": {"found": found, "empty": empty, "manual": manual},
            "chosen": {"accuracy": by_accuracy, "log_likelihood": by_likelihood},
        }  # fmt: skip

    judged = [row(0.8, 0.6, 0.7, "manual", "found"), {**row(0.5, 0.6, 0.4, "empty", "found"),
                                                      "seed": 2}]  # fmt: skip
    cells = [{**one, "marks": []} for one in judged]
    grid = report.Grid(cells, judged, {"length": 5, "longer": []})
    line = report.guard_table(grid, "pruned")[-1]
    # Found is ahead of empty once, of manual twice, of both once; kept never and twice.
    assert line == "| greedy | 2 | 1, 2, 1 | 0, 2 | 65.0 | 65.0 | 65.0 | 55.0 |"
