"""Rules of benchmarks/k_center.py: the plain loop is k-center, and agreement is told right."""

import sys
from importlib import import_module

import numpy as np
import pytest

from prunery.pruners.sample.farthest import farthest_first


@pytest.fixture
def bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield import_module("k_center")
    for name in ("k_center", "fresh", "sections"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["clustered", "spread"])
def test_the_plain_loop_picks_the_same(bench, kind):
    rows = bench.rows_of(kind, 700, 3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    assert np.array_equal(rows, bench.rows_of(kind, 700, 3))
    ours = farthest_first(rows, 50, start=5)[0]
    assert np.array_equal(bench.running_minimum(rows, 50, 5), ours)


def test_agreement_says_what_parts_the_picks(bench):
    rows = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    made = bench.compare(rows, np.array([0, 2, 1]), np.array([0, 2, 1]))
    assert made == {"compared": 3, "same_places": 3, "same_rows": 3}
    made = bench.compare(rows, np.array([0, 2, 1, 3]), np.array([0, 1, 3]))
    assert (made["same_places"], made["same_rows"], made["first_difference"]) == (1, 2, 1)
    assert made["float64_gap"] == pytest.approx(2.0 - 1.0)
    assert "further in float64 by 1.0e+00" in bench.agreement(made)


def test_the_section_names_what_was_timed(bench):
    case = {"seconds": [2.0], "peak_bytes": 2**20}
    found = {
        "numpy": {**case, "seconds": [10.0], "picks_timed": 20},
        "ours": {**case, "compared": 20, "same_places": 20, "same_rows": 20},
    }
    kernels = {"step": {"plain": case, "torch": case}, "topk": {"plain": case}}
    where = {"gpu": None, "processor": "p", "threads": 1, "python": "3", "versions": {}}
    made = {"choice": {"clustered 5000": found}, "kernels": kernels, "picks": 200, "seed": 0}
    made |= {"rows": 10, "queries": 2, "repeats": 1, "command": "c"}
    made["machine"] = {**where, "load_before": 0.0}
    text = bench.section(made, "cpu")
    assert "5,000 clustered rows, 200 picks (numpy: 20 picks, times 10):" in text
    assert "| ours | 2000.0 | 2000.0 to 2000.0 | 5.00 | 1.0 |" in text
    assert "20 of 20 picks are the same" in text
