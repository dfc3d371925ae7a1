"""Golden cases worked by hand, one or more for each context method."""

import numpy as np
import pytest

from prunery.errors import InputError
from prunery.pruners.context.cosine import Cosine
from prunery.pruners.context.dslr import Dslr
from prunery.pruners.context.first_k import FirstK
from prunery.pruners.context.lexrank import LexRank
from prunery.pruners.context.provence import Provence
from prunery.pruners.context.random_sentences import RandomSentences
from prunery.pruners.contract import Signals
from prunery.pruners.rules import uniform


def run(method, **arrays):
    arrays.setdefault("id", np.arange(len(next(iter(arrays.values())))))
    return method(Signals(arrays), seed=0)


def tokens_of(rows):
    """Ragged token probabilities, and the means that belong to them."""
    return {
        "keep_probability": np.array([np.mean(row) for row in rows], np.float32),
        "token_offset": np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        "token_keep_probability": np.array([p for row in rows for p in row], np.float32),
    }


def test_provence_mean_is_strict():
    made = run(
        Provence(threshold=0.25),
        passage=np.array([1, 1, 2]),
        keep_probability=np.array([0.25, 0.2500001, 0.9], np.float32),
    )
    assert made.keep.tolist() == [False, True, True]
    assert made.reason_names() == ["below_threshold", "above_threshold", "above_threshold"]


def test_provence_mean_and_vote_disagree():
    # Row 0: mean 0.45 > 0.4, but only 1 of 3 tokens above. Row 1: mean 0.34, 2 of 3 above.
    # Row 2: exactly half of the tokens above: dropped by the vote.
    rows = tokens_of([[0.95, 0.2, 0.2], [0.41, 0.41, 0.2], [0.9, 0.1]])
    passage = np.array([7, 7, 7])
    mean = run(Provence(threshold=0.4), passage=passage, **rows)
    vote = run(Provence(threshold=0.4, aggregation="vote"), passage=passage, **rows)
    assert mean.keep.tolist() == [True, False, True]
    assert vote.keep.tolist() == [False, True, False]
    np.testing.assert_allclose(vote.score, [1 / 3, 2 / 3, 1 / 2], atol=1e-7)
    assert vote.threshold.tolist() == [0.5] * 3


def test_provence_vote_needs_the_tokens():
    with pytest.raises(InputError, match="token_keep_probability"):
        run(
            Provence(aggregation="vote"),
            passage=np.array([1]),
            keep_probability=np.array([0.5], np.float32),
        )


TITLED = {
    "passage": np.array([1, 1, 2, 2, 3]),
    "title": np.array([True, False, True, False, True]),
    "keep_probability": np.array([0.1, 0.9, 0.9, 0.1, 0.9], np.float32),
}


def test_provence_title_follows_its_passage():
    made = run(Provence(threshold=0.5), **TITLED)
    # Passage 2: the title scores high by itself and still goes. Passage 3 is all title.
    assert made.keep.tolist() == [True, True, False, False, True]
    assert made.reason_names() == [
        "title",
        "above_threshold",
        "title_alone",
        "below_threshold",
        "above_threshold",
    ]


def test_provence_title_by_its_own_score():
    made = run(Provence(threshold=0.5, keep_title=False), **TITLED)
    assert made.keep.tolist() == [False, True, True, False, True]


def test_provence_min_sentences_protection_and_empty():
    arrays = {
        "passage": np.array([1, 1, 1, 2, 2]),
        "keep_probability": np.array([0.1, 0.3, 0.3, 0.2, 0.1], np.float32),
    }
    best = run(Provence(threshold=0.5, min_sentences=1), **arrays)
    assert best.keep.tolist() == [False, True, False, True, False]
    assert best.reason_names()[1] == "among_best"
    guarded = np.array([True, False, False, False, False])
    top1 = run(Provence(threshold=0.5, on_empty="top1"), protected=guarded, **arrays)
    assert top1.keep.tolist() == [True, False, False, True, False]
    assert top1.reason_names()[:1] + top1.reason_names()[3:4] == ["protected", "best_of_empty"]
    whole = run(Provence(threshold=0.25, on_empty="original"), **arrays)
    assert whole.keep.tolist() == [False, True, True, True, True]
    assert whole.reason_names()[3] == "whole_passage"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("threshold", 1.1),
        ("threshold", float("nan")),
        ("aggregation", "max"),
        ("on_empty", "x"),
        ("min_sentences", -1),
    ],
)
def test_provence_refuses_options(option, value):
    with pytest.raises(InputError, match=option):
        Provence(**{option: value})


def test_cosine_keeps_a_share_of_each_passage():
    made = run(
        Cosine(keep=0.5),
        passage=np.array([1, 1, 1, 2]),
        question_similarity=np.array([0.2, 0.7, 0.2, -0.5], np.float32),
    )
    # ceil(1.5) = 2 of passage 1 (the tie goes to the smaller id), ceil(0.5) = 1 of passage 2.
    assert made.keep.tolist() == [True, True, False, True]


def test_dslr_is_a_sigmoid_above_a_threshold():
    # sigmoid(ln 3) = 0.75, sigmoid(0) = 0.5, sigmoid(-ln 3) = 0.25.
    logits = np.log(np.array([3, 1, 1 / 3]))
    made = run(Dslr(threshold=0.5), cross_encoder_logit=logits.astype(np.float32))
    assert made.keep.tolist() == [True, False, False]
    np.testing.assert_allclose(made.score, [0.75, 0.5, 0.25], atol=1e-7)


def test_first_k():
    made = run(FirstK(k=2), passage=np.array([5, 5, 5, 6]), position=np.array([2, 0, 1, 0]))
    assert made.keep.tolist() == [False, True, True, True]


def test_random_sentences_keeps_the_largest_draws():
    ids = np.arange(100, 106)
    made = run(RandomSentences(keep=0.5), id=ids, passage=np.array([1, 1, 1, 1, 2, 2]))
    draws = uniform(0, ids)
    expected = np.zeros(6, bool)
    expected[np.argsort(-draws[:4])[:2]] = True
    expected[4 + np.argmax(draws[4:])] = True
    assert made.keep.tolist() == expected.tolist()


def star(weight=1.0):
    """Sentence 0 shares one term with 1 and another with 2; 1 and 2 share nothing.

    Unit rows: (a, b)/sqrt 2, a, b. Cosines: 0-1 and 0-2 are 1/sqrt 2 = c, 1-2 is 0.
    """
    return {
        "passage": np.array([9, 9, 9]),
        "term_offset": np.array([0, 2, 3, 4]),
        "term": np.array([0, 1, 0, 1]),
        "term_weight": np.full(4, weight, np.float32),
    }


def test_lexrank_continuous():
    # Degrees with the self edge: 1 + 2c and 1 + c. Two unknowns x (centre), y (each leaf):
    # x = 0.05 + 0.85 (x / (1 + 2c) + 2 c y / (1 + c)),  x + 2 y = 1.
    c = 2**-0.5
    a, b = 1 / (1 + 2 * c), 2 * c / (1 + c)
    x = (0.05 + 0.85 * b / 2) / (1 - 0.85 * a + 0.85 * b / 2)
    made = run(LexRank(keep=0.34), **star())
    np.testing.assert_allclose(made.score, [3 * x, 3 * (1 - x) / 2, 3 * (1 - x) / 2], atol=2e-6)
    # ceil(0.34 * 3) = 2: the centre, and of the tied leaves the smaller id.
    assert made.keep.tolist() == [True, True, False]


def test_lexrank_threshold():
    # Edges of weight 1 where the cosine exceeds 0.1: degrees 3 and 2.
    # x = 0.05 + 0.85 (x / 3 + 2 y / 2), x + 2 y = 1  ->  x = 0.475 / (1 - 0.85/3 + 0.425).
    x = 0.475 / (1 - 0.85 / 3 + 0.425)
    made = run(LexRank(threshold=0.1), **star())
    np.testing.assert_allclose(made.score, [3 * x, 3 * (1 - x) / 2, 3 * (1 - x) / 2], atol=2e-6)
    # Above all cosines nothing but the self edges is left: all are average.
    np.testing.assert_allclose(run(LexRank(threshold=0.8), **star()).score, 1.0, atol=2e-6)


def test_lexrank_against_dense_algebra():
    rng = np.random.default_rng(0)
    n, vocabulary = 40, 30
    dense = rng.random((n, vocabulary)) * (rng.random((n, vocabulary)) < 0.15)
    dense[3] = 0
    row, term = np.nonzero(dense)
    passage = np.repeat([4, 2, 8, 1], 10)
    offset = np.concatenate([[0], np.cumsum((dense > 0).sum(1))])
    for threshold in (None, 0.2):
        made = run(
            LexRank(threshold=threshold),
            passage=passage,
            term_offset=offset,
            term=term,
            term_weight=dense[row, term].astype(np.float32),
        )
        for group in np.unique(passage):
            rows = np.flatnonzero(passage == group)
            vectors = dense[rows]
            norm = np.linalg.norm(vectors, axis=1, keepdims=True)
            unit = vectors / np.where(norm == 0, 1, norm)
            weights = unit @ unit.T
            if threshold is not None:
                weights = (weights > threshold).astype(float)
            np.fill_diagonal(weights, 1.0)
            step = weights / weights.sum(1, keepdims=True)
            # Stationary distribution of 0.15 jump + 0.85 walk, by linear algebra.
            p = np.linalg.solve(np.eye(10) - 0.85 * step.T, np.full(10, 0.15 / 10))
            np.testing.assert_allclose(made.score[rows], 10 * p, atol=3e-6)


def test_lexrank_is_blind_to_a_common_weight():
    assert np.array_equal(run(LexRank(), **star(1.0)).score, run(LexRank(), **star(7.5)).score)


def test_lexrank_refuses_options():
    for options in ({"jump": 0.0}, {"jump": 1.5}, {"threshold": -0.1}, {"keep": 2.0}):
        with pytest.raises(InputError):
            LexRank(**options)
