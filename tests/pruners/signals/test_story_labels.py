"""A real small model as a black box: its answers are those of a loop over full logits."""

import gzip

import numpy as np
import pytest
import torch

from prunery.pruners.signals import token_tree
from prunery.pruners.signals.black_box import Template
from prunery.pruners.signals.causal_labels import CausalLabels

from .stories260k import StoryTokenizer, fast_tokenizer, load_stories
from .test_language_labels import naive_causal


@pytest.fixture(scope="module")
def stories(shared_data):
    """(model, tokenizer, beginnings of stories)."""
    folder = shared_data / "ckpt_stories260K"
    text_file = shared_data / "lm_tinystories" / "tinystories_sample.first80pct.txt.gz"
    if not folder.is_dir() or not text_file.is_file():
        pytest.skip("ckpt_stories260K or lm_tinystories is not among the shared data")
    model = load_stories(folder / "stories260K.bin")
    size = model.config.vocab_size
    tokenizer = fast_tokenizer(folder / "tok512.bin", size)
    with gzip.open(text_file, "rt", encoding="utf-8") as file:
        texts = [text.strip() for text in file.read(60_000).split("<|endoftext|>")]
    slow = StoryTokenizer(folder / "tok512.bin", size)
    for text in texts[:20]:
        assert tokenizer(text)["input_ids"] == slow.encode(text)
    return model, tokenizer, [text[:150].strip() for text in texts if len(text) > 200]


@pytest.mark.parametrize("source", ["{text} {prompt} She was very", "{prompt} {text}"])
def test_answers_are_those_of_the_loop(stories, source):
    model, tokenizer, rows = stories
    prompts = ["", "friend", "big dog", "big toy", "Then they all went home."]
    words = ["happy", "sad", "excited"]
    template = Template(source)
    box = CausalLabels(model, tokenizer, words, template=template)
    wanted, counts = naive_causal(model, tokenizer, template, words, False, prompts, rows[:4])
    found = box.label_logprobs(prompts, rows[:4])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert box.input_tokens(prompts, rows[:4]).tolist() == counts.tolist()
    with torch.no_grad():
        assert token_tree.fits(model)


def test_the_model_knows_what_makes_one_happy(stories):
    model, tokenizer, _ = stories
    box = CausalLabels(
        model, tokenizer, ["happy", "sad"], template=Template("{text} {prompt} She was very")
    )
    rows = [
        "Lily lost her toy and started to cry.",
        "Lily got a big gift from her mom and smiled.",
    ]
    lost, got = np.exp(box.label_logprobs([""], rows)[0, :, 0])
    assert lost < got
