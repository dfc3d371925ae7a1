"""Ids of filled templates: those of the whole strings, however they are put together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunery.errors import InputError
from prunery.pruners.signals.black_box import Template
from prunery.pruners.signals.rendered import Renderer

from .label_models import tokenizer_of

NAMES = ["llama", "gpt2", "roberta", "t5", "bert"]
TEMPLATES = [
    "{text} {prompt}",
    "{prompt} {text}",
    "Text: {text} Mood: {prompt} So",
    "{prompt}, says it: {text} (so)",
    "{text}\n{prompt}\n",
    "{text}{prompt}",
    "{{ {text}  {prompt} }}",
    "{text} {prompt} {mask} .",
]
# Letters that normalisers, pre-tokenisers and merges treat in a way of their own.
ODD = st.text("ab ',.!1é中▁Ġ\n\t\u00a0\u200b\u0301\u3000ﬁ☃<>/s", max_size=8)
WORDS = st.sampled_from(["great", "film.", "it's", "", "2019", "<s>", "</s>", "x", " a", "a "])
TEXT = st.one_of(ODD, WORDS)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    source=st.sampled_from(TEMPLATES),
    prompts=st.lists(TEXT, min_size=1, max_size=4),
    rows=st.lists(TEXT, min_size=1, max_size=4),
)
def test_ids_are_those_of_whole_strings(name, source, prompts, rows):
    tokenizer = tokenizer_of(name)
    template, values = Template(source), {"mask": "a"}
    for ends in (True, False):
        renderer = Renderer(tokenizer, template, values, ends=ends)
        for _ in range(2):  # the second time from what is remembered
            found = renderer(prompts[:2], rows)
            found = renderer(prompts, rows)
        cut = 1 if not ends and name in ("t5", "bert", "roberta") else 0
        lengths = found.by_prompt(found.lengths())
        for p, prompt in enumerate(prompts):
            for n, row in enumerate(rows):
                whole = tokenizer(template.render(prompt=prompt, text=row, **values))["input_ids"]
                made = found.ids(n, p) if found.text_first else found.ids(p, n)
                assert list(made) == whole[: len(whole) - cut]
                assert lengths[p, n] == len(made)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", TEMPLATES[:4])
def test_plain_words_are_tokenised_side_by_side(name, source):
    """The short way is the one that is taken, or it would be no faster."""
    tokenizer = tokenizer_of(name)
    renderer = Renderer(tokenizer, Template(source))
    found = renderer(["good film", "review"], ["a great delight.", "bad"])
    assert not found.whole
    assert None not in found.left + found.right


def test_pieces_that_reach_over_a_space_forbid_it():
    tokenizer = tokenizer_of("llama")
    state = tokenizer.backend_tokenizer.to_str()
    merged = state.replace('"vocab":{', '"vocab":{"good▁film":471,', 1)
    merged = merged.replace('"merges":[', '"merges":[["▁good","▁film"],', 1)
    merged = merged.replace('"good▁film":471', '"▁good▁film":471')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(merged)
    ids = tokenizer("good film")["input_ids"]
    assert 471 in ids
    renderer = Renderer(tokenizer, Template("{text} {prompt}"))
    found = renderer(["film"], ["bad", "good"])
    assert list(found.ids(1, 0)) == ids
    assert found.left == [None, None]


def test_special_tokens_that_eat_spaces_are_noticed():
    """A token may take the white space beside it, which the border stands on."""
    tokenizer = tokenizer_of("gpt2")
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<gap>", rstrip=True, lstrip=True)])
    template = Template("{text} {prompt}")
    rows, prompts = ["a <gap>", "great"], ["film", "<gap> x"]
    found = Renderer(tokenizer, template)(prompts, rows)
    for n, row in enumerate(rows):
        for p, prompt in enumerate(prompts):
            whole = tokenizer(template.render(prompt=prompt, text=row))["input_ids"]
            assert list(found.ids(n, p)) == whole


def test_a_special_token_in_a_text_changes_what_follows_it():
    """Llama's normaliser sets its mark of a word's start behind every special token again."""
    tokenizer = tokenizer_of("llama")
    found = Renderer(tokenizer, Template("{text} {prompt}"))(["", "1"], ["<s>", "film"])
    assert list(found.ids(0, 1)) == tokenizer("<s> 1")["input_ids"]
    assert found.left[0] is None
    assert found.left[1] is not None


def test_both_slots_are_needed():
    with pytest.raises(InputError, match=r"expected \{text\} and \{prompt\}; found text"):
        Renderer(tokenizer_of("gpt2"), Template("{text}"))
