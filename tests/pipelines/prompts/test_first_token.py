"""The first token of a reply: both shapes, whose word it begins, bounds, and broken replies."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunery.errors import RecipeError
from prunery.pipelines.openai_calls import TryAgainError
from prunery.pipelines.prompts.first_token import LabelWords, parse_reply


def parsed(logprobs, **more):
    return parse_reply(json.dumps({"choices": [{"logprobs": logprobs}], **more}).encode(), 1)


def as_bytes(**values):
    return [(token.encode(), value) for token, value in values.items()]


def test_both_shapes_say_the_same():
    classic = {
        "tokens": [" yes"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" yes": -0.5, "é": -1}],
    }
    chat = [
        {"token": " yes", "logprob": -0.5, "bytes": None},
        {"token": "?", "logprob": -1, "bytes": [195, 169]},
    ]
    chats = {"content": [{**chat[0], "top_logprobs": chat}]}
    want = [(b" yes", -0.5), (b"\xc3\xa9", -1.0)]
    assert parsed(classic).candidates == parsed(chats).candidates == want
    usage = {"usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    reply = parsed(classic, **usage)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.requests) == (9, 1, 1)
    for odd in ({"prompt_tokens": -1}, {"prompt_tokens": True}, {"prompt_tokens": "9"}, None):
        assert parsed(classic, usage=odd).prompt_tokens is None


def test_the_token_written_is_a_candidate_though_not_listed():
    alone = {"tokens": [" yes"], "token_logprobs": [-2.0], "top_logprobs": None}
    assert parsed(alone).candidates == [(b" yes", -2.0)]
    beside = {"tokens": [" yes"], "token_logprobs": [-2.0], "top_logprobs": [{" no": -0.2}]}
    assert parsed(beside).candidates == [(b" no", -0.2), (b" yes", -2.0)]
    first = {"token": "a", "logprob": -2.0, "top_logprobs": [{"token": "b", "logprob": -0.2}]}
    assert parsed({"content": [first]}).candidates == [(b"b", -0.2), (b"a", -2.0)]
    first["top_logprobs"] = []
    assert parsed({"content": [first]}).candidates == [(b"a", -2.0)]


@pytest.mark.parametrize(
    "none",
    [None, {}, {"content": None}, {"tokens": [], "token_logprobs": [], "top_logprobs": None}],
)
def test_no_log_probabilities(none):
    assert parsed(none).candidates is None


def test_nothing_written():
    assert parsed({"content": []}).candidates == []
    assert parsed({"tokens": [], "token_logprobs": [], "top_logprobs": []}).candidates == []


@pytest.mark.parametrize("choice", [{"text": "\ufffd"}, {"message": {"content": "\ufffd"}}])
def test_part_of_a_letter(choice):
    reply = parse_reply(json.dumps({"choices": [{**choice, "logprobs": None}]}).encode(), 1)
    assert (reply.candidates, reply.partial) == ([], True)
    whole = parse_reply(b'{"choices": [{"text": "x"}]}', 1)
    assert (whole.candidates, whole.partial) == (None, False)


def test_no_probability_is_no_candidate_and_bytes_are_read_as_spelt():
    top = {"a": -9999.0, "b": -3.4e38, "bytes:\\xe2\\x96": -1.0, "<0x0A>": -2.0, "c": 1e-7}
    assert parsed({"top_logprobs": [top]}).candidates == [
        (b"\xe2\x96", -1.0),
        (b"\n", -2.0),
        (b"c", 0.0),
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"logprobs": 3}]}',
        b'{"choices": [{"logprobs": {"top_logprobs": [{"a": 0.5}]}}]}',
        b'{"choices": [{"logprobs": {"top_logprobs": [{"a": NaN}]}}]}',
        b'{"choices": [{"logprobs": {"top_logprobs": [{"a": "-1"}]}}]}',
        b'{"choices": [{"logprobs": {"top_logprobs": [["a", -1]]}}]}',
        b'{"choices": [{"logprobs": {"content": [{"logprob": -1, "top_logprobs": []}]}}]}',
        b'{"choices": [{"logprobs": {"content": [{"token": "a", "logprob": 0, "bytes": [900]}]}}]}',
    ],
)
def test_what_is_no_reply_is_broken(body):
    with pytest.raises(TryAgainError, match="not a completion") as caught:
        parse_reply(body, 1)
    assert caught.value.broken


def test_words_that_one_token_cannot_tell_apart_are_refused():
    with pytest.raises(RecipeError, match="'notable' begins with 'not'"):
        LabelWords(["yes", "notable", "not"])
    with pytest.raises(RecipeError, match="at least 2"):
        LabelWords(["yes"])


def test_case_counts_only_where_words_need_it():
    folded = LabelWords(["Yes", "no"])
    assert [folded.begun_by(t) for t in (b" YE", b"N", "Ġyes".encode(), "▁ no".encode())] == [
        [0],
        [1],
        [0],
        [1],
    ]
    exact = LabelWords(["US", "us"])
    assert [exact.begun_by(t) for t in (b" U", b"us", b"uS")] == [[0], [1], []]
    assert LabelWords(["Polish", "polish"]).begun_by(b"pol") == [1]


def test_what_begins_no_class():
    words = LabelWords(["yes", "no"])
    for token in (b"", b" ", "▁".encode(), b"\n", b"yes.", b"es", b"x", b"\xff"):
        assert words.begun_by(token) == []
    assert LabelWords(["да", "нет"]).begun_by(b" \xd0\xb4") == [0]
    assert LabelWords(["да", "нет"]).begun_by(b"\xd0") == [0, 1]


def test_a_class_not_returned_gets_its_bound():
    words = LabelWords(["good", "bad", "meh"])
    got = words.score(as_bytes(**{" good": math.log(0.6), "x": math.log(0.3)}))
    # 0.1 is left over, less than the lowest returned; both missing classes take it.
    assert np.exp(got.logprobs) == pytest.approx([0.6 / 0.8, 0.1 / 0.8, 0.1 / 0.8], rel=1e-6)
    assert (got.bounded, got.blind, got.unresolved) == (2, False, b"")
    got = words.score(as_bytes(**{" good": math.log(0.06), "x": math.log(0.03)}))
    assert np.exp(got.logprobs) == pytest.approx([0.5, 0.25, 0.25], rel=1e-6)
    got = words.score(
        as_bytes(**{"g": math.log(0.2), " good": math.log(0.3), "BAD": math.log(0.5)})
    )
    assert np.exp(got.logprobs[:2]) == pytest.approx([0.5, 0.5], rel=1e-5)
    assert math.log(1e-8) < got.logprobs[2] < math.log(1e-6)  # rounding leaves no more than that


def test_blind_replies_are_even_and_far_ones_finite():
    words = LabelWords(["good", "bad"])
    for nothing in ([], as_bytes(x=-0.1)):
        got = words.score(nothing)
        assert got.logprobs == pytest.approx([math.log(0.5)] * 2)
        assert (got.blind, got.bounded) == (True, 0)
    got = words.score(as_bytes(good=-0.0, x=-9000.0))
    assert np.isfinite(got.logprobs).all() and got.logprobs[1] == -9000.0


def test_a_token_that_begins_several_words_is_shared():
    words = LabelWords(["positive", "possible", "negative"])
    got = words.score(as_bytes(pos=math.log(0.8), neg=math.log(0.1)))
    assert np.exp(got.logprobs) == pytest.approx([4 / 9, 4 / 9, 1 / 9], rel=1e-6)
    assert got.unresolved == b"pos"
    got = words.score(as_bytes(pos=math.log(0.2), neg=math.log(0.7)))
    assert got.unresolved == b""


@given(
    st.lists(st.text("abAB", min_size=1, max_size=4), min_size=2, max_size=4, unique=True),
    st.dictionaries(st.text(" abAB", max_size=4), st.floats(0.001, 1.0), max_size=8),
)
def test_scores_are_the_mass_of_prefixes(words, weights):
    """Worked out again in plain Python, with probabilities in place of their logarithms."""
    try:
        labels = LabelWords(words)
    except RecipeError:
        assert any(a != b and b.startswith(a) for a in words for b in words)
        return
    total = sum(weights.values()) * 1.25
    share = {token: weight / total for token, weight in weights.items()}
    lower = [word.lower() for word in words]
    apart = not any(a is not b and b.startswith(a) for a in lower for b in lower)
    mass = [0.0] * len(words)
    for token, p in share.items():
        bare = token.lstrip(" ")
        hit = [
            c
            for c, word in enumerate(words)
            if bare and (word.lower().startswith(bare.lower()) if apart else word.startswith(bare))
        ]
        for c in hit:
            mass[c] += p / len(hit)
    got = labels.score([(token.encode(), math.log(p)) for token, p in share.items()])
    assert got.blind == (sum(mass) == 0)
    assert got.bounded == (0 if got.blind else sum(m == 0 for m in mass))
    if got.blind:
        mass = [1.0] * len(words)
    else:
        least = min(min(share.values()), 0.2)
        mass = [m or least for m in mass]
    want = [m / sum(mass) for m in mass]
    assert np.exp(got.logprobs.astype(np.float64)) == pytest.approx(want, rel=1e-4)
