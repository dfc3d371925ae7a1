from itertools import pairwise

import numpy as np
import pytest

from prunery.errors import InputError, ModelError
from prunery.pruners.context.provence import Provence
from prunery.pruners.signals.context import (
    Batching,
    Scorer,
    batches,
    context_signals,
    pair_signals,
    ranges,
    segment_mean,
)

from ..context.scripted import scripted
from ..context.standin import small_provence


def scorer(words=None, **options):
    loaded, forward = scripted(words or {"yes": 0.9}, rank={"yes": 1.0}, **options)
    return Scorer.of(loaded, forward), forward


def test_segment_mean_against_a_loop():
    rng = np.random.default_rng(0)
    sizes = np.array([0, 3, 0, 0, 5, 1, 0])
    offset = np.concatenate([[0], np.cumsum(sizes)])
    values = rng.random(9).astype(np.float32)
    expected = [values[a:b].mean() if b > a else 0 for a, b in pairwise(offset)]
    np.testing.assert_allclose(segment_mean(values, offset), expected, atol=1e-7)
    assert segment_mean(np.zeros(0, np.float32), np.zeros(1, np.int64)).tolist() == []
    assert segment_mean(np.zeros(0, np.float32), np.zeros(3, np.int64)).tolist() == [0, 0]


def test_ranges_against_a_loop():
    offset = np.array([0, 2, 2, 5, 6])
    rows = np.array([2, 1, 0, 2])
    assert ranges(offset, rows).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert ranges(offset, np.array([1])).tolist() == []


def test_batches_hold_each_block_once_within_the_budget():
    lengths = np.random.default_rng(1).integers(5, 400, 300)
    for batching in (Batching(1000, 0.1), Batching(1000, 0.0), Batching(10**6, 1.0)):
        seen = []
        for group in batches(lengths, batching):
            longest = lengths[group].max()
            assert len(group) * longest <= batching.tokens or len(group) == 1
            assert lengths[group].min() >= longest * (1 - batching.slack)
            seen += group.tolist()
        assert sorted(seen) == list(range(300))
    assert len(list(batches(lengths, Batching(10**6, 1.0)))) == 1
    assert len(list(batches(lengths, Batching(10**6, 0.0)))) == len(set(lengths.tolist()))


def test_rows_under_the_contracts_names():
    ready, _ = scorer()
    made = context_signals(
        ready, ["what?", "who?"], [["Yes. No.", "No."], ["Yes yes."]], [["T", None], None]
    )
    signals = made.signals(passage_ids=np.array([11, 12, 13]), question_ids=np.array([1, 1, 2]))
    assert signals["passage"].tolist() == [11, 11, 12, 13]
    assert signals["question"].tolist() == [1, 1, 1, 2]
    assert signals["position"].tolist() == [0, 1, 0, 0]
    assert signals["tokens"].tolist() == [2, 2, 2, 3]
    np.testing.assert_allclose(
        signals["keep_probability"], [(0.9 + 0.05) / 2, 0.05, 0.05, (1.8 + 0.05) / 3], atol=1e-6
    )
    assert signals["relevance_logit"].tolist() == [1, 1, 0, 2]
    for aggregation in ("mean", "vote"):
        Provence(aggregation=aggregation)(signals, seed=0)
    assert "token_offset" not in made.signals(token_probabilities=False)


def test_relevance_is_the_best_block():
    ready, forward = scorer(max_length=32)
    made = context_signals(ready, ["what?"], [["No word here. " * 30 + "Yes. " + "No. " * 30]])
    assert made.blocks.tolist() == [len(forward.rows)]
    assert made.blocks[0] > 5
    assert made.relevance_logit.tolist() == [1.0]


def test_equal_pairs_are_scored_once_and_laid_out_again():
    ready, forward = scorer()
    texts = ["Yes. No no.", "Other.", "Yes. No no.", "", "Yes. No no."]
    made = context_signals(ready, ["a?", "b?"], [texts, texts[:1]])
    assert len(forward.rows) == 3
    alone = context_signals(ready, ["a?"], [["Yes. No no."]])
    passage = made.passage
    for pair in (0, 2, 4, 5):
        rows = passage == pair
        assert made.keep_probability[rows].tolist() == alone.keep_probability.tolist()
        assert made.packed.spans[rows].tolist() == alone.packed.spans.tolist()
    assert made.packed.token_offset[-1] == len(made.token_keep_probability)
    assert made.tokens.tolist() == [2, 3, 2, 2, 3, 2, 3, 2, 3]


def test_pairs_in_rows():
    ready, _ = scorer()
    spans = [[(0, 9)], [(0, 3), (3, 6)]]
    made = pair_signals(ready, ["a?", "b?"], ["Yes. No. ", "No yes"], ["t", None], sentences=spans)
    assert made.packed.spans.tolist() == [[0, 9], [0, 3], [3, 6]]
    assert made.question.tolist() == [0, 1]
    with pytest.raises(InputError, match="passages has 1 entries for 2 questions"):
        pair_signals(ready, ["a?", "b?"], ["x"])
    with pytest.raises(InputError, match="`?titles`? has 1"):
        pair_signals(ready, ["a?", "b?"], ["x", "y"], ["t"])


def test_the_title_is_scored_in_the_first_block():
    ready, _ = scorer(max_length=32)
    made = context_signals(ready, ["what?"], [["No no no no. " * 20, "No."]], [["yes no", "no"]])
    np.testing.assert_allclose(made.title_keep_probability, [(0.9 + 0.05) / 2, 0.05], atol=1e-6)


def test_broken_networks_are_refused():
    loaded, _ = scripted()

    def broken(ids, mask, types):
        keep = np.where(mask == 1, 0.0, np.nan).astype(np.float32)
        return np.zeros(len(ids), np.float32), keep

    # Padding may hold anything; a real token may not.
    context_signals(Scorer.of(loaded, broken), ["a?"], [["x", "y z w"]])

    def worse(ids, mask, types):
        keep = np.zeros(ids.shape, np.float32)
        keep[0, 4] = np.inf
        return np.zeros(len(ids), np.float32), keep

    with pytest.raises(ModelError, match="not finite"):
        context_signals(Scorer.of(loaded, worse), ["a?"], [["x y z"]])


def test_onnx_gives_the_same_scores():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from prunery.pruners.signals.onnx_forward import onnx_forward

    loaded = small_provence()
    questions, passages = (
        ["What is it?"],
        [["One thing. Another, longer thing!", "Short.", "x " * 90]],
    )
    plain = context_signals(loaded, questions, passages)
    other = context_signals(Scorer.of(loaded, onnx_forward(loaded, threads=1)), questions, passages)
    np.testing.assert_allclose(other.relevance_logit, plain.relevance_logit, atol=1e-4)
    np.testing.assert_allclose(
        other.token_keep_probability, plain.token_keep_probability, atol=1e-5
    )
