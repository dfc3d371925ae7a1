"""A real model on the text it was trained for: its losses are those it is known by."""

import gzip

import numpy as np
import pytest
import torch

from prunery.pruners.signals.tokens import PromptAttention, score_tokens

from .causal_models import padded
from .stories260k import StoryTokenizer, load_stories


@pytest.fixture(scope="module")
def stories(shared_data):
    """(model, ids of the first stories, at most 256 tokens each)."""
    folder = shared_data / "ckpt_stories260K"
    text_file = shared_data / "lm_tinystories" / "tinystories_sample.first80pct.txt.gz"
    if not folder.is_dir() or not text_file.is_file():
        pytest.skip("ckpt_stories260K or lm_tinystories is not among the shared data")
    model = load_stories(folder / "stories260K.bin")
    tokenizer = StoryTokenizer(folder / "tok512.bin", model.config.vocab_size)
    with gzip.open(text_file, "rt", encoding="utf-8") as file:
        text = file.read(40_000)
    found = [story.strip() for story in text.split("<|endoftext|>")]
    rows = [torch.tensor(tokenizer.encode(story)[:256]) for story in found[:20] if story]
    return model, rows


def test_perplexity_of_tiny_stories(stories):
    """The model's makers give a validation loss of 1.297 nats.

    The notes beside the data give a perplexity of 4.72 on 20 stories of their choice; a wrong
    layout of the weights gives hundreds.
    """
    model, rows = stories
    ids, mask = padded(rows, "right")
    targets = mask.bool() & (torch.arange(ids.shape[1]) > 0)
    scores = score_tokens(model, ids, targets, attention_mask=mask, attention=PromptAttention())
    assert len(scores.loss) > 2000
    assert abs(float(scores.loss.mean()) - 1.297) < 0.1
    # A model that knows its text is surest where it is right.
    assert np.corrcoef(scores.loss, scores.entropy)[0, 1] > 0.3
    # Every token but the first is a target, so the mass on the first is what is left: the sink.
    assert 0 < float(scores.prompt_attention.mean()) < 1
