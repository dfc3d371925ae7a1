"""Rules of benchmarks/dataset_scale.py: what is planted, and what counts as found."""

import sys
from importlib import import_module

import numpy as np
import pytest


@pytest.fixture
def bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield import_module("dataset_scale")
    for name in ("dataset_scale", "fresh", "sections"):
        sys.modules.pop(name, None)


def test_copies_stand_at_the_cosine_that_was_drawn(bench):
    vectors, source, cosine = bench.with_copies(500, 0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    found = (vectors[450:] * vectors[source]).sum(axis=1)
    np.testing.assert_allclose(found, cosine, atol=1e-5)
    assert (cosine < 0.95).any() and (cosine >= 0.95).any()
    others = vectors[:450] @ vectors[:450].T - np.eye(450)
    assert others.max() < 0.95, "no duplicate but the planted ones"


def test_a_pair_is_found_where_one_of_the_two_was_dropped(bench):
    vectors, source, cosine = bench.with_copies(500, 0)
    copy = np.arange(450, 500)
    keep = np.ones(500, bool)
    assert bench.recall(vectors, keep, source, cosine)["planted"] == 0
    keep[copy[::2]] = False
    keep[source[1::2]] = False
    made = bench.recall(vectors, keep, source, cosine)
    assert made["planted"] == 1
    near = vectors[copy] @ vectors.T >= 0.95
    near[np.arange(50), copy] = False
    assert made["exact_pairs"] == near.sum()
    open_pairs = near & keep[copy][:, None] & keep
    assert made["exact"] == pytest.approx(1 - open_pairs.sum() / near.sum())
    keep[:] = True
    lost = np.flatnonzero(cosine >= 0.95)
    keep[copy[lost[:3]]] = False
    assert bench.recall(vectors, keep, source, cosine)["planted"] >= 3 / len(lost)


def test_a_peer_that_is_absent_is_named_in_the_table(bench):
    machine = {"processor": "x", "gpu": None, "threads": 1, "python": "3", "versions": {}}
    ours = {
        "seconds": 2.0,
        "peak_bytes": 1 << 20,
        "recall": {"kept": 0.9, "planted": 1.0, "exact": 1.0},
    }
    made = {
        "part": "dedup",
        "seed": 0,
        "command": "c",
        "machine": machine | {"load_before": 0.0},
        "ours": {"1000": ours, "2000": ours | {"seconds": 5.0}},
        "peers": {"1000": {"ours": ours, "semhash": {"failed": "No module named 'semhash'"}}},
    }
    text = bench.section(made)
    assert "| 2,000 | 5.00 | 1 | 2.50 | 90.00 | 100.00 | 100.00 |" in text
    assert "No module named 'semhash'" in text
