"""Golden case: SplitMix64 worked by hand with Python integers."""

import numpy as np

from prunery.pruners.contract import Signals
from prunery.pruners.sample.random import Random

MASK = 2**64 - 1


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw(seed, row_id):
    golden = 0x9E3779B97F4A7C15
    bits = mix(mix((row_id + golden) & MASK) ^ mix((seed + golden) & MASK))
    return ((bits >> 11) + 0.5) / 2**53


def test_golden():
    ids = [5, 3, 9, 2**62]
    expected = [draw(11, i) for i in ids]
    selection = Random(keep=0.5)(Signals({"id": ids}), seed=11)
    np.testing.assert_allclose(selection.score, expected, rtol=1e-7)
    best = sorted(range(4), key=lambda i: -expected[i])[:2]
    assert sorted(np.flatnonzero(selection.keep)) == sorted(best)
    assert selection.threshold[0] == np.float32(sorted(expected)[2])
