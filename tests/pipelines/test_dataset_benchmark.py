"""The rules by which the benchmarks of dataset pruning compare."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture
def report(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    for name in ("dataset_quality_report", "dataset_quality", "label_noise", "sections", "fresh"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import dataset_quality_report

    return dataset_quality_report


def run(method, fraction, distilled, seed, accuracy, **more):
    return {
        "data": "d", "noise": 0.0, "method": method, "fraction": fraction, "distilled": distilled,
        "seed": seed, "accuracy": accuracy, "alpha": 0.5 * distilled, "wrong": 0.0, "steps": 10,
        "train_rows": 100, "test_rows": 50, **more,
    }  # fmt: skip


def test_differences_are_paired_by_seed(report):
    ours = [run("el2n", 0.5, False, seed, value) for seed, value in enumerate((0.9, 0.8, 0.7))]
    random = [run("random", 0.5, False, seed, value) for seed, value in enumerate((0.8, 0.7, 0.6))]
    point, low, high = report.gap(ours, random)
    assert (point, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert report.verdict(low, high) == "wins"
    assert report.verdict(*report.gap(random, ours)[1:]) == "loses"
    # Of 0, 1 and 2 the mean is 1, the deviation 1, and 4.303 the quantile of two degrees.
    assert report.interval([0.0, 1.0, 2.0])[1:] == pytest.approx(
        (1 - 4.302653 / 3**0.5, 1 + 4.302653 / 3**0.5), rel=1e-6
    )
    assert report.verdict(*report.interval([0.5])[1:]) == "ties"


def test_a_cell_that_lacks_a_seed_is_left_out(report):
    runs = [run("random", 0.5, False, seed, 0.5) for seed in (1, 0)]
    runs.append(run("el2n", 0.5, False, 0, 0.5))
    cells = report.by_cell(runs)
    assert list(cells) == [("random", 0.5, False)]
    assert [r["seed"] for r in cells["random", 0.5, False]] == [0, 1]


def test_claims_name_the_side_that_wins(report):
    levels = {
        ("random", 0.5): (0.80, 0.95), ("el2n", 0.5): (0.70, 0.85), ("full", 1.0): (0.90, 0.91),
    }  # fmt: skip
    runs = [
        run(method, fraction, distilled, seed, levels[method, fraction][distilled])
        for method, fraction in levels
        for distilled in (False, True)
        for seed in range(3)
    ]
    lines = "\n".join(report.section(runs, "d", 0.0, ["random", "el2n"], 20))
    assert "10 steps of 20 rows a student (2.0 passes over the full data)" in lines
    assert "without: +5.0 [+5.0, +5.0] points (wins)" in lines
    assert "Random against `el2n`, both with a teacher: 50%: +10.0 [+10.0, +10.0]" in lines
    assert "| -10.0 [-10.0, -10.0] | loses | 85.0 |" in lines


def test_cells_outlive_a_stop(report, tmp_path):
    import dataset_quality

    path = tmp_path / "cells.jsonl"
    cells = dataset_quality.Cells(path)
    cells.add(run("random", 0.1, True, 0, 0.5))
    again = dataset_quality.Cells(path)
    assert again.found == cells.found
    assert list(again.found) == [("d", 0.0, "random", 0.1, True, 0)]
    assert json.loads(path.read_text())["accuracy"] == 0.5


def test_a_share_of_labels_is_flipped_to_other_classes(report):
    import label_noise

    clean = np.arange(1000) % 10
    label = label_noise.flipped(clean, 0.1, seed=3)
    assert (label != clean).sum() == 100
    assert label.min() >= 0 and label.max() <= 9
    assert not np.array_equal(label, label_noise.flipped(clean, 0.1, seed=4))
    assert len(np.unique((label - clean)[label != clean] % 10)) == 9
