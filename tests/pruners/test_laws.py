"""The laws that every method in METHODS must pass, generated from the catalogue.

They also hold with main switches the other way, where the method claims so: see `SWITCHED`.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import SIGNALS, Signals

from .laws import make_signals

LEVELS = {
    "fraction": [0.0, 0.1, 0.3, 0.5, 0.9, 1.0],
    "fraction_per_group": [0.0, 0.1, 0.3, 0.5, 0.9, 1.0],
    "fraction_of_groups": [0.0, 0.1, 0.3, 0.5, 0.9, 1.0],
    "fraction_of_cost": [0.0, 0.1, 0.3, 0.5, 0.9, 1.0],
    "count_per_group": [0, 1, 2, 5, 100],
    "threshold": [0.0, 0.05, 0.2, 0.5, 0.8, 1.0],
}

SWITCHED = {
    "qtuning, rank": ("qtuning", {"normalise": "rank"}),
    "qtuning, log": ("qtuning", {"normalise": "log", "mix": 0.0}),
    "qtuning, drop lowest": ("qtuning", {"direction": "drop_lowest", "mix": 1.0}),
    "qtuning, few tokens": ("qtuning", {"tokens": 0.0}),
    "qtuning, protected go": ("qtuning", {"keep_protected": False}),
    "sstoken, detrend": ("sstoken", {"detrend": True}),
    "sstoken, loss alone": ("sstoken", {"gamma": 1.0}),
    "sstoken, attention alone": ("sstoken", {"gamma": 0.0, "keep_protected": False}),
    "qurating, tempered": ("qurating", {"temperature": 0.7}),
    "perplexity_window, bottom": ("perplexity_window", {"centre": 0.0}),
    "deita, all near": ("deita", {"distance": 1.0}),
    "s2l, few clusters": ("s2l", {"clusters": 3}),
    "perplexity_tokens, drop lowest": ("perplexity_tokens", {"direction": "drop_lowest"}),
    "el2n, easy": ("el2n", {"order": "easy", "first_epoch": 2, "last_epoch": 5, "reduce": "sum"}),
    "el2n, runs": ("el2n", {"runs": 3}),
    "grand, easy": ("grand", {"order": "easy", "runs": 2}),
    "forgetting, easy": ("forgetting", {"order": "easy", "runs": 2}),
    "aum, hard": ("aum", {"order": "hard", "runs": 4}),
    "memorisation, easy": ("memorisation", {"order": "easy"}),
    "prototypes, easy": ("prototypes", {"order": "easy"}),
    "dyn_unc, short windows": ("dyn_unc", {"window": 3, "runs": 2}),
    "tdds, short windows": ("tdds", {"window": 3, "epochs": 5, "runs": 2}),
    "dual, top": ("dual", {"sampling": "none", "runs": 2}),
    "ccs, no cut": ("ccs", {"cutoff": 0.0, "strata": 5}),
    "cfsp, powers": ("cfsp", {"inner": 0.5, "outer": 0.0}),
    "llm_pruner, mean": ("llm_pruner", {"reduce": "mean"}),
    "llm_pruner, max": ("llm_pruner", {"reduce": "max"}),
    "llm_pruner, prod": ("llm_pruner", {"reduce": "prod"}),
    "reap, without gate": ("reap", {"gated": False}),
    "expert_frequency, gate": ("expert_frequency", {"count": "gate"}),
    "ccs, all cut": ("ccs", {"cutoff": 1.0}),
    "d2, cut": ("d2", {"cutoff": 0.4, "gamma": 1.0}),
}


# Methods outside a law, and why.
NOT_MONOTONE = {
    "dual": "the density that it draws from moves with the budget, as published",
}


class Switched:
    """A method with some options set: what it declares is read through."""

    def __init__(self, method, options):
        self.method, self.options = method, options

    def __getattr__(self, name):
        return getattr(self.method, name)

    def __call__(self, **options):
        return self.method(**{**self.options, **options})


CASES = {name: Switched(method, {}) for name, method in METHODS.items()} | {
    name: Switched(METHODS[method], options) for name, (method, options) in SWITCHED.items()
}
every_method = pytest.mark.parametrize("name", CASES)


def levels(method):
    return LEVELS[method.budget.kind]


def at(method, level):
    return method(**{method.budget.field: level})


def optional_off(method, signals):
    """Without the optional signals: nothing is forced in, so budgets are exact."""
    return Signals({name: signals[name] for name in signals if name not in method.optional})


def same(a, b):
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name == "threshold")
        for f in dataclasses.fields(a)
        if f.name not in ("reasons", "rival")
    )


@every_method
@pytest.mark.parametrize("n", [0, 1, 257])
def test_mask_is_aligned_and_whole(name, n):
    method = CASES[name]
    signals = make_signals(method, n)
    for level in levels(method):
        selection = at(method, level)(signals, seed=0)
        assert len(selection.keep) == n
        assert np.isfinite(selection.score).all()
        assert (selection.reason < len(selection.reasons)).all()
        lost = selection.rival[selection.rival >= 0]
        assert selection.keep[lost].all(), "a rival must itself be kept"
        assert not selection.keep[selection.rival >= 0].any(), "a kept row lost to nobody"
        assert sum(selection.dropped().values()) == n - selection.kept
        assert np.isfinite(selection.weight).all()
        assert (selection.weight[selection.keep] > 0).all()
        assert not selection.weight[~selection.keep].any(), "a dropped row weighs nothing"


@every_method
def test_a_reason_means_one_verdict(name):
    method = CASES[name]
    selection = method()(make_signals(method, 257), seed=0)
    for code in np.unique(selection.reason):
        assert len(np.unique(selection.keep[selection.reason == code])) == 1


@every_method
@pytest.mark.parametrize("ties", [False, True])
def test_budget_is_met_exactly(name, ties):
    method = CASES[name]
    signals = optional_off(method, make_signals(method, 257, ties=ties))
    for level in levels(method):
        selection = at(method, level)(signals, seed=3)
        kind = method.budget.kind
        if kind == "fraction":
            assert selection.kept == math.ceil(round(level * 257, 9))
        elif kind == "fraction_of_groups":
            groups = np.unique(signals[method.group])
            kept = np.unique(signals[method.group][selection.keep])
            assert len(kept) == math.ceil(round(level * len(groups), 9))
        elif kind == "fraction_of_cost":
            cost, wanted = signals["cost"], math.ceil(round(level * signals["cost"].sum(), 9))
            held = cost[selection.keep]
            assert held.sum() >= wanted
            if len(held):
                last = cost[
                    selection.keep & (selection.score == selection.score[selection.keep].min())
                ]
                assert held.sum() - last.max() < wanted
        elif kind == "threshold":
            assert np.array_equal(selection.keep, selection.score > np.float32(level))
        else:
            groups, sizes = np.unique(signals[method.group], return_counts=True)
            for group, size in zip(groups, sizes, strict=True):
                quota = (
                    math.ceil(round(level * size, 9))
                    if kind == "fraction_per_group"
                    else min(level, size)
                )
                assert selection.keep[signals[method.group] == group].sum() == quota


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_MONOTONE])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_monotone_in_the_budget(name, ties, forced):
    method = CASES[name]
    signals = make_signals(method, 257, ties=ties)
    if not forced:
        signals = optional_off(method, signals)
    masks = [at(method, level)(signals, seed=1).keep for level in levels(method)]
    if method.budget.kind == "threshold":
        masks.reverse()
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


@every_method
@pytest.mark.parametrize("ties", [False, True])
def test_row_order_does_not_matter(name, ties):
    method = CASES[name]
    signals = make_signals(method, 257, ties=ties)
    order = np.random.default_rng(5).permutation(257)
    for level in levels(method):
        plain = at(method, level)(signals, seed=2)
        shuffled = at(method, level)(signals.take(order), seed=2)
        assert np.array_equal(plain.keep[order], shuffled.keep)
        assert np.array_equal(plain.reason[order], shuffled.reason)
        np.testing.assert_allclose(plain.score[order], shuffled.score, rtol=0, atol=2e-6)


@every_method
def test_shards_do_not_matter(name):
    """Where the scope allows a cut, the cut changes nothing; elsewhere the score may not move
    with rows that play no part in it (checked for scores that are drawn or given)."""
    method = CASES[name]
    signals = make_signals(method, 257)
    whole = method()(signals, seed=4)
    if method.scope == "table":
        if method.needs == {"id"}:
            part = np.arange(100)
            assert np.array_equal(whole.score[part], method()(signals.take(part), seed=4).score)
        return
    shard = signals["id"] % 3 if method.scope == "row" else signals[method.group] % 3
    for number in range(3):
        rows = np.flatnonzero(shard == number)
        part = method()(signals.take(rows), seed=4)
        assert np.array_equal(whole.keep[rows], part.keep)
        np.testing.assert_allclose(whole.score[rows], part.score, rtol=0, atol=2e-6)


@every_method
def test_same_seed_same_selection(name):
    method = CASES[name]
    signals = make_signals(method, 257)
    assert same(method()(signals, seed=7), method()(signals, seed=7))


@every_method
def test_signals_are_not_written_to(name):
    method = CASES[name]
    signals = make_signals(method, 64)
    before = {key: signals[key].copy() for key in signals}
    for key in signals:
        signals[key].flags.writeable = False
    method()(signals, seed=0)
    for key in signals:
        assert np.array_equal(before[key], signals[key])


@every_method
def test_ties_go_to_the_smaller_id(name):
    method = CASES[name]
    signals = optional_off(method, make_signals(method, 257, ties=True))
    group = signals[method.group] if method.group else np.zeros(257, np.int64)
    for level in levels(method):
        selection = at(method, level)(signals, seed=0)
        for member in np.unique(group):
            rows = np.flatnonzero(group == member)
            for score in np.unique(selection.score[rows]):
                tied = rows[selection.score[rows] == score]
                kept_first = selection.keep[tied][np.argsort(signals["id"][tied])]
                assert (np.diff(kept_first.astype(int)) <= 0).all()


@every_method
def test_non_finite_signals_are_refused_by_name(name):
    method = CASES[name]
    floats = [key for key in sorted(method.needs) if SIGNALS[key].dtype == "float32"]
    for key in floats:
        for poison in (np.nan, np.inf):
            arrays = dict(make_signals(method, 40))
            arrays[key] = arrays[key].copy()
            arrays[key].flat[0] = poison
            with pytest.raises(InputError, match=f"`{key}`"):
                method()(Signals(arrays), seed=0)


@every_method
def test_missing_signals_are_refused_by_name(name):
    method = CASES[name]
    for key in sorted(method.needs - {"id"}):
        ragged = {k for k in SIGNALS if SIGNALS[k].ragged_by == key}
        arrays = {k: v for k, v in make_signals(method, 40).items() if k != key and k not in ragged}
        with pytest.raises(InputError, match="needed and missing"):
            method()(Signals(arrays), seed=0)


@every_method
def test_options_out_of_range_are_refused(name):
    method = CASES[name]
    with pytest.raises(InputError, match=method.budget.field):
        at(method, -1)
