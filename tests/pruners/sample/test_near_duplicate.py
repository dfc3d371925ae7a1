"""Golden case: four sentences, two of them the same but for a full stop."""

import numpy as np

from prunery.pruners.contract import Signals
from prunery.pruners.sample.near_duplicate import NearDuplicate


def unit(*angles_in_degrees):
    radians = np.deg2rad(angles_in_degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_golden_chain():
    # Rows at 0, 10, 20 and 90 degrees, ids 1..4 but stored in another order.
    # cos(10) = 0.98481, so each of 10 and 20 is within 0.05 of the row before it, and both
    # lost to the row at 0 degrees; cos(70) = 0.34202.
    signals = Signals({"id": [3, 1, 4, 2], "embedding": unit(20, 0, 90, 10)})
    selection = NearDuplicate(distance=0.05)(signals, seed=0)
    assert selection.keep.tolist() == [False, True, True, False]
    assert selection.rival.tolist() == [1, -1, -1, 1]
    assert selection.reason_names() == ["near_duplicate", "distinct", "distinct", "near_duplicate"]
    np.testing.assert_allclose(
        selection.score, [1 - 0.984808, 2.0, 1 - 0.342020, 1 - 0.984808], atol=1e-5
    )


def test_exact_copy_goes_even_at_distance_zero():
    vectors = np.random.default_rng(1).standard_normal((1, 384)).astype(np.float32)
    vectors = np.repeat(vectors / np.linalg.norm(vectors), 3, axis=0)
    selection = NearDuplicate(distance=0.0)(
        Signals({"id": [5, 6, 7], "embedding": vectors}), seed=0
    )
    assert selection.keep.tolist() == [True, False, False]
    assert selection.score[1:].tolist() == [0.0, 0.0]
