"""Templates: slots filled as they are, the empty prompt without a trace, mistakes by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import InputError, RecipeError
from prunery.pruners.signals.black_box import BlackBox, Template
from prunery.pruners.signals.encoder_labels import EncoderLabels


@pytest.mark.parametrize(
    ("source", "prompt", "made"),
    [
        ("{prompt} {text}", "Say:", "Say: T"),
        ("{prompt} {text}", "", "T"),
        ("{text} {prompt}", "", "T"),
        ("{text} {prompt} It was", "so", "T so It was"),
        ("{text} {prompt} It was", "", "T It was"),
        ("{text}\n{prompt} It was", "", "T\nIt was"),
        ("{text}\n{prompt}\nIt was", "", "T\n\nIt was"),
        ("{text}{prompt}", "", "T"),
        ("{{{text}}} {prompt}", "{text}", "{T} {text}"),
    ],
)
def test_render(source, prompt, made):
    assert Template(source).render(prompt=prompt, text="T") == made


def test_a_text_keeps_its_own_space_and_braces():
    assert Template("{text}{prompt}").render(prompt="", text="ends ") == "ends "
    assert Template("{text} {prompt}").render(prompt="", text="{prompt} ") == "{prompt} "


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_any_text_is_put_in_as_it_is(text, prompt):
    assert (
        Template("a {prompt}|{text} b").render(prompt=prompt, text=text) == f"a {prompt}|{text} b"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{txt}", "unknown slot"),
        ("{text} {text}", "twice"),
        ("{text", "without its partner"),
        ("text}", "without its partner"),
        ("{}", "unknown slot"),
    ],
)
def test_a_wrong_template_is_refused(source, said):
    with pytest.raises(RecipeError, match=said):
        Template(source)


def test_check_names_what_is_missing_and_what_has_no_place():
    with pytest.raises(RecipeError, match=r"needs the slot \{text\}"):
        Template("{prompt}").check(needs=["text"], allows=["prompt"])
    with pytest.raises(RecipeError, match=r"\{mask\} has no place"):
        Template("{text} {mask}").check(needs=["text"], allows=["prompt"])


WORDS = {"good": 0, "bad": 1, "fine": 2}


class Bag:
    """Counts words into three places; remembers what it was asked."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        made = np.full((len(texts), 3), 0.1, np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                if word in WORDS:
                    made[row, WORDS[word]] += 1
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def count(self, texts):
        return np.array([len(text.split()) for text in texts], np.int64)


def box(bag, template="{text}", label_template="{prompt} {label}", **more):
    return EncoderLabels(
        bag.encode,
        bag.count,
        ["good", "bad"],
        template=Template(template),
        label_template=Template(label_template),
        **more,
    )


@pytest.mark.parametrize(
    ("template", "label_template"),
    [
        ("{text}", "{prompt} {label}"),
        ("{prompt} {text}", "{label}"),
        ("{text} {prompt}", "a {prompt} {label}"),
    ],
)
def test_log_probabilities_by_the_definition(template, label_template):
    bag, rows, prompts = Bag(), ["good good bad", "bad fine"], ["", "fine", "bad good"]
    made = box(bag, template, label_template, temperature=0.3).label_logprobs(prompts, rows)
    assert made.dtype == np.float32
    assert made.shape == (3, 2, 2)
    for p, prompt in enumerate(prompts):
        for n, row in enumerate(rows):
            text = bag.encode([Template(template).render(prompt=prompt, text=row)])[0]
            labels = bag.encode(
                [Template(label_template).render(prompt=prompt, label=w) for w in ("good", "bad")]
            )
            logits = labels @ text / 0.3
            expected = logits - np.log(np.exp(logits).sum())
            np.testing.assert_allclose(made[p, n], expected, atol=1e-5)


def test_rows_are_encoded_once_where_the_prompt_is_in_the_labels():
    bag = Bag()
    made = box(bag)
    made.label_logprobs(["fine", "bad"], ["one good", "two bad"])
    made.label_logprobs(["good"], ["one good", "two bad"])
    assert bag.seen.count("one good") == 1
    assert len(bag.seen) == 2 + 2 * 3
    assert isinstance(made, BlackBox)


def test_tokens_count_what_is_read():
    made = box(Bag(), "{text} {prompt}", "{prompt} {label}")
    np.testing.assert_array_equal(
        made.input_tokens(["", "x y"], ["a b c", "d"]), [[3 + 2, 1], [5 + 6, 3]]
    )
    np.testing.assert_array_equal(box(Bag()).input_tokens(["x"], ["a b c", "d"]), [[4, 0]])


def test_nothing_asked_nothing_said():
    made = box(Bag())
    assert made.label_logprobs([], ["a"]).shape == (0, 1, 2)
    assert made.label_logprobs(["a"], []).shape == (1, 0, 2)
    assert made.input_tokens([], []).shape == (0, 0)


def test_bad_boxes_are_refused():
    with pytest.raises(InputError, match="no prompt changes"):
        box(Bag(), "{text}", "{label}")
    with pytest.raises(InputError, match="temperature"):
        box(Bag(), temperature=0.0)
    with pytest.raises(InputError, match="at least 2 classes"):
        EncoderLabels(
            Bag().encode, Bag().count, ["one"],
            template=Template("{text}"), label_template=Template("{prompt} {label}"),
        )  # fmt: skip
