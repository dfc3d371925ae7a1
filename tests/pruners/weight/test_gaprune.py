"""GAPrune: a case worked by hand, and what its parts do."""

import math

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.contract import Signals
from prunery.pruners.weight.gaprune import GaPrune

ORDER = ("weight", "domain_fisher", "general_fisher", "gradient_alignment")


def signals(weight, domain, general, alignment):
    return Signals(
        {
            "id": np.arange(len(weight)) + 5,
            "weight": np.array(weight, np.float32),
            "domain_fisher": np.array(domain, np.float32),
            "general_fisher": np.array(general, np.float32),
            "gradient_alignment": np.array(alignment, np.float32),
        }
    )


def test_golden_case():
    # |w| = 0.25, 1, 0.25, 1; sqrt = 0.5, 1, 0.5, 1; times 0.3 = 0.15, 0.3, 0.15, 0.3
    # (Fd - Fg)|w| = 1, -2, 0, 0.5; factor = 1.1 (a = 0.5), 0.8 (a = -1), 1, 1.2 (a = 1)
    # score = 1.1 + 0.15, -1.6 + 0.3, 0.15, 0.6 + 0.3
    made = GaPrune(keep=0.5)(
        signals([0.25, -1, -0.25, 1], [5, 1, 2, 1], [1, 3, 2, 0.5], [0.5, -1, 0.3, 1]), seed=0
    )
    np.testing.assert_allclose(made.score, [1.25, -1.3, 0.15, 0.9], atol=1e-6)
    assert made.keep.tolist() == [True, False, False, True]
    assert made.reason_names() == ["important", "unimportant", "unimportant", "important"]
    np.testing.assert_allclose(made.threshold, 0.9, atol=1e-6)


def test_beta_and_the_weight_of_the_square_root():
    given = signals([0.25, 1], [1, 1], [1, 1], [0, 0])
    score = GaPrune(beta=2.0, regularisation=0.5)(given, seed=0).score
    np.testing.assert_allclose(score, [-0.25 + 0.25, -1 + 0.5], atol=1e-6)


def test_the_published_score_puts_weights_in_the_same_order():
    rng = np.random.default_rng(3)
    given = signals(rng.normal(size=400), rng.random(400), rng.random(400), rng.uniform(-1, 1, 400))
    made = GaPrune()(given, seed=0)
    published = []
    for w, d, g, a in zip(*(given[k].tolist() for k in ORDER), strict=True):
        size = abs(w)
        inner = (d * size - g * size) * min(max(1 + 0.2 * a, 0.8), 1.2)
        published.append(math.log1p(math.exp(inner + 0.3 * math.sqrt(size + 1e-8))))
    best = np.argsort(-np.array(published), kind="stable")[:200]
    assert set(best.tolist()) == set(np.flatnonzero(made.keep).tolist())


def test_without_gradients_it_is_magnitude():
    weight = np.random.default_rng(0).normal(size=101)
    made = GaPrune(keep=0.3)(signals(weight, [0] * 101, [0] * 101, [0] * 101), seed=0)
    assert set(np.flatnonzero(made.keep)) == set(np.argsort(-np.abs(weight))[:31])


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"regularisation": math.nan}, {"keep": 1.5}])
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        GaPrune(**options)


def test_a_negative_fisher_is_refused():
    with pytest.raises(InputError, match="domain_fisher"):
        GaPrune()(signals([1.0], [-1.0], [0.0], [0.0]), seed=0)
