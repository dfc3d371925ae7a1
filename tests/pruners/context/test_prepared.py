"""Passages tokenised by one and run by another: blocks of many callers in one batch."""

import numpy as np
import pytest

from prunery.errors import ModelError
from prunery.pruners.context.options import PruneOptions
from prunery.pruners.context.pruner import ContextPruner
from prunery.pruners.context.result import decide
from prunery.pruners.signals.context_blocks import batch_arrays

from .standin import small_provence

CALLS = [
    ("who wrote Emma", ["Jane Austen wrote it. It is long. " * 30, "", "A tuple is short."]),
    ("what is a tuple", ["A tuple is short.", "A tuple is short."]),
]


@pytest.fixture(scope="module")
def pruner():
    return ContextPruner(small_provence())


def run_together(pruner, calls, seed):
    """All blocks of all calls, shuffled, three at a time."""
    prepared = [pruner.prepare([question], [passages]) for question, passages in calls]
    blocks = [(p.scores, block) for p in prepared for block in range(len(p.scores.lengths))]
    order = np.random.default_rng(seed).permutation(len(blocks))
    for start in range(0, len(blocks), 3):
        chosen = [blocks[i] for i in order[start : start + 3]]
        width = max(int(scores.lengths[block]) for scores, block in chosen)
        arrays = batch_arrays([(scores.packed, block) for scores, block in chosen], width)
        rank, keep = pruner.scorer.forward(*arrays)
        for row, (scores, block) in enumerate(chosen):
            scores.put(block, float(rank[row]), keep[row])
    return prepared


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_of_many_calls_score_as_each_call_alone(pruner, seed):
    for (question, passages), shared in zip(CALLS, run_together(pruner, CALLS, seed), strict=True):
        assert shared.scores.left == 0
        alone = pruner.score([question], [passages])
        together = shared.passages()
        assert [one.blocks for one in together] == [one.blocks for one in alone]
        for a, b in zip(together, alone, strict=True):
            assert a.relevance_logit == pytest.approx(b.relevance_logit, abs=1e-4)
            np.testing.assert_allclose(
                a.token_keep_probability, b.token_keep_probability, atol=1e-5
            )
        made = decide(together, PruneOptions(threshold=0.5))[0]
        assert [one.index for one in made] == [
            one.index for one in pruner.prune(question, passages, threshold=0.5)
        ]


def test_asked_before_its_blocks_were_run(pruner):
    prepared = pruner.prepare(["who"], [["some text"]])
    with pytest.raises(ModelError, match="1 blocks have no score"):
        prepared.passages()


def test_a_number_that_is_not_finite_spoils_its_own_passage_alone(pruner):
    prepared = pruner.prepare(["who"], [["bad text", "fine text", "bad text"]])
    for block in range(len(prepared.scores.lengths)):
        packed = prepared.scores.packed
        length = int(prepared.scores.lengths[block])
        keep = np.zeros(length, np.float32)
        if packed.block_pair[block] == 0:
            keep[packed.body_start(0)] = np.nan
        prepared.scores.put(block, 0.5, keep)
    assert prepared.finite.tolist() == [False, True, False]
    made = prepared.finite_passages()
    assert [one is None for one in made] == [True, False, True]
    assert made[1].index == 1
    assert made[1].relevance_logit == 0.5
    with pytest.raises(ModelError, match="not finite"):
        prepared.passages()


def test_what_stands_in_the_padding_is_not_read(pruner):
    prepared = pruner.prepare(["who"], [["some text"]])
    length = int(prepared.scores.lengths[0])
    keep = np.concatenate([np.zeros(length, np.float32), np.full(4, np.inf, np.float32)])
    prepared.scores.put(0, 0.0, keep)
    assert prepared.passages()[0].token_keep_probability.tolist() == [0.5] * len(
        prepared.scores.packed.ids
    )
