"""A method inside each stratum, put back in place."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.catalogue import METHODS
from prunery.pruners.contract import Signals
from prunery.pruners.sample.longest import Longest
from prunery.pruners.sample.near_duplicate import NearDuplicate
from prunery.pruners.sample.random import Random
from prunery.pruners.strata import stratified
from prunery.pruners.token.qtuning import QTuning
from prunery.pruners.token.token_cleaning import TokenCleaning

from .laws import make_signals


def test_small_domain_survives():
    signals = Signals({"id": range(8), "answer_tokens": [9, 8, 7, 6, 5, 4, 1, 2]})
    strata = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    plain = Longest(keep=0.5)(signals, seed=0)
    assert not plain.keep[6:].any()
    selection = stratified(Longest(keep=0.5), signals, strata, seed=0)
    assert selection.keep.tolist() == [True] * 3 + [False] * 3 + [False, True]
    assert selection.score.tolist() == [9, 8, 7, 6, 5, 4, 1, 2]
    assert selection.threshold.tolist() == [7] * 6 + [2] * 2


@pytest.mark.parametrize("name", METHODS)
def test_each_stratum_is_decided_alone(name):
    method = METHODS[name]
    signals = make_signals(method, 120)
    group = signals[method.group or ("sample" if "sample" in method.needs else "id")]
    strata = group % 3
    whole = stratified(method(), signals, strata, seed=2)
    for code in range(3):
        rows = np.flatnonzero(strata == code)
        alone = method()(signals.take(rows), seed=2)
        for field in ("keep", "score", "weight"):
            assert np.array_equal(getattr(whole, field)[rows], getattr(alone, field))
        assert [whole.reasons[c] for c in whole.reason[rows]] == alone.reason_names()
        lost = alone.rival >= 0
        assert np.array_equal(whole.rival[rows][lost], rows[alone.rival[lost]])
        assert (whole.rival[rows][~lost] == -1).all()


def test_rival_is_found_in_its_own_stratum():
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 0, 0]]
    signals = Signals({"id": [4, 3, 2, 1], "embedding": vectors})
    selection = stratified(NearDuplicate(), signals, np.array([1, 0, 1, 0]), seed=0)
    assert selection.keep.tolist() == [False, False, True, True]
    assert selection.rival.tolist() == [2, 3, -1, -1]


def test_reasons_that_differ_are_merged():
    class Two:
        """Names its reasons by its size."""

        needs, optional, group = frozenset({"id"}), frozenset(), None

        def __call__(self, signals, *, seed):
            made = Random(keep=1.0)(signals, seed=seed)
            names = ("small", "gone") if signals.n == 1 else ("large", "gone")
            return type(made)(made.keep, made.score, made.reason, names)

    selection = stratified(Two(), Signals({"id": [1, 2, 3]}), np.array([0, 1, 1]), seed=0)
    assert selection.reason_names() == ["small", "large", "large"]


def test_nothing():
    assert stratified(Random(), Signals({"id": []}), np.zeros(0, np.int64), seed=0).kept == 0


@pytest.mark.parametrize("method", [QTuning(), TokenCleaning()])
def test_sample_across_strata_is_refused(method):
    signals = make_signals(type(method), 40)
    sample, sizes = np.unique(signals["sample"], return_counts=True)
    split = sample[sizes.argmax()]
    strata = np.zeros(40, np.int64)
    strata[np.flatnonzero(signals["sample"] == split)[0]] = 1
    with pytest.raises(InputError, match=f"sample {split} is in stratum"):
        stratified(method, signals, strata, seed=0)


def test_misaligned_strata_are_refused():
    with pytest.raises(InputError, match="one code for each of 3 rows"):
        stratified(Random(), Signals({"id": [1, 2, 3]}), np.zeros(2, np.int64), seed=0)
