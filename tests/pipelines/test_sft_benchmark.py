"""Rules of benchmarks/sft_quality.py: equal budgets, and who wins."""

import sys
from importlib import import_module

import numpy as np
import pytest


@pytest.fixture
def bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield import_module("sft_quality"), import_module("sft_quality_report")
    for name in ("sft_quality", "sft_quality_report", "sft_lm", "sections"):
        sys.modules.pop(name, None)


def runs(losses, counts=(1, 3)):
    return [{"loss_sum": list(sums), "loss_count": list(counts)} for sums in losses]


def test_the_difference_is_paired_and_signed(bench):
    _, report = bench
    low, high = runs([(1.0, 6.0), (2.0, 6.0)]), runs([(2.0, 9.0), (3.0, 9.0)])
    point, left, right = report.difference(low, high)
    assert point == pytest.approx(-1.0)
    assert left == right == pytest.approx(-1.0), "every row differs by one nat a token"
    assert report.verdict(left, right) == "wins"
    back = report.difference(high, low)
    assert back[0] == pytest.approx(1.0)
    assert report.verdict(*back[1:]) == "loses"
    assert report.verdict(-0.1, 0.1) == "ties"


def test_whole_samples_meet_the_budget_of_tokens(bench):
    quality, _ = bench
    from sft_lm import Sample

    from prunery.pruners.catalogue import METHODS
    from prunery.pruners.contract import Signals

    lengths = [4, 1, 7, 3]
    samples = [Sample(np.arange(n + 2), np.arange(n + 2) >= 2) for n in lengths]
    signals = Signals({"id": np.arange(1, 5), "answer_tokens": np.array(lengths)})
    chosen = quality.by_samples(samples, METHODS["longest"]()(signals, seed=0), 0.6)
    assert [int(mask.sum()) for mask in chosen] == [2, 0, 7, 0], "9 of 15, the last one cut short"
    assert chosen[0].tolist() == [False, False, True, True, False, False]


def test_qtuning_stays_within_the_budget(bench):
    quality, _ = bench
    from prunery.pruners.catalogue import METHODS

    from ..pruners.laws import make_signals

    signals = make_signals(METHODS["qtuning"], 400)
    for budget in quality.BUDGETS:
        kept = int(quality.qtuning_within(signals, budget, 0.5, 0).sum())
        assert budget * 400 - 20 < kept <= budget * 400
