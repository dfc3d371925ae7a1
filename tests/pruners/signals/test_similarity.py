import numpy as np
import pytest

from prunery.errors import InputError, ModelError
from prunery.pruners.signals.context import pair_signals
from prunery.pruners.signals.similarity import (
    ProvenceScorer,
    cross_encoder_logit,
    question_similarity,
)
from prunery.pruners.signals.terms import term_signals, terms

from ..context.standin import small_provence


class Letters:
    """Counts of a, b and c: an encoder whose cosines can be worked out by hand."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return np.array([[text.count(c) for c in "abc"] for text in texts], np.float64)


def test_cosine_by_hand():
    encoder = Letters()
    made = question_similarity(
        encoder, ["a", "ab"], ["aa", "b", "ab", "xyz", "aa"], np.array([0, 0, 1, 1, 1])
    )
    np.testing.assert_allclose(made, [1, 0, 1, 0, 2**-0.5], atol=1e-6)
    assert len(encoder.seen) == len(set(encoder.seen))
    assert made.dtype == np.float32


def test_cosine_refuses_bad_input_and_bad_vectors():
    with pytest.raises(InputError, match="2 texts were given with 1"):
        question_similarity(Letters(), ["a"], ["x", "y"], np.array([0]))
    with pytest.raises(InputError, match=r"0\.\.0"):
        question_similarity(Letters(), ["a"], ["x"], np.array([1]))

    class Broken:
        def encode(self, texts):
            return np.full((len(texts), 2), np.nan)

    with pytest.raises(ModelError, match="finite vectors"):
        question_similarity(Broken(), ["a"], ["x"], np.array([0]))
    assert question_similarity(Broken(), ["a"], [], np.array([])).tolist() == []


def test_cross_encoder_scores_each_pair_once():
    calls = []

    class Lengths:
        def predict(self, pairs):
            calls.extend(pairs)
            return [len(q) - len(t) for q, t in pairs]

    made = cross_encoder_logit(
        Lengths(), ["aaa", "b"], ["x", "xx", "x", "x"], np.array([0, 0, 0, 1])
    )
    assert made.tolist() == [2, 1, 2, 0]
    assert len(calls) == 3

    class Short:
        def predict(self, pairs):
            return [0.0]

    with pytest.raises(ModelError, match="2 finite logits"):
        cross_encoder_logit(Short(), ["a"], ["x", "y"], np.array([0, 0]))


def test_a_provence_ranks_sentences_too():
    loaded = small_provence()
    pairs = [("who?", "Ann did."), ("why?", "It rained."), ("who?", "It rained.")]
    made = ProvenceScorer(loaded).predict(pairs)
    whole = pair_signals(loaded, [q for q, _ in pairs], [t for _, t in pairs])
    np.testing.assert_allclose(made, whole.relevance_logit, atol=1e-5)


def test_terms():
    assert terms("The CAT's hat, 3 hats; STRASSE straße") == [
        *["the", "cat", "s", "hat", "3", "hats", "strasse", "strasse"]
    ]
    assert terms("猫は、cat") == ["猫", "は", "cat"]


def test_tf_idf_by_hand():
    made = term_signals(["a b b", "a c", "a", ""])
    # a stands in three of four texts, b and c in one.
    assert made["term_offset"].tolist() == [0, 2, 4, 5, 5]
    assert made["term"].tolist() == [0, 1, 0, 2, 0]
    a, b = np.log(4 / 3), np.log(4)
    np.testing.assert_allclose(made["term_weight"], [a, 2 * b, a, b, a], rtol=1e-6)


def test_a_term_of_every_text_weighs_nothing():
    made = term_signals(["a b", "a c"])
    assert made["term"].tolist() == [1, 2]
    assert term_signals([])["term_offset"].tolist() == [0]
