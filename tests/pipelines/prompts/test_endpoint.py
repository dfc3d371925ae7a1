"""A black box behind HTTP, against a real server on the loopback that behaves and misbehaves."""

from __future__ import annotations

import gc
import hashlib
import math
import time

import numpy as np
import pytest

from prunery.errors import InputError, ModelError, PruneryWarning, RecipeError
from prunery.pipelines.prompts.asking import AskOptions, RemoteBox
from prunery.pipelines.prompts.endpoint import EndpointLabels
from prunery.pipelines.prompts.task import PromptTaskOptions
from prunery.pruners.signals.black_box import BlackBox

from ..chat_server import Said, classic, content, serving

WORDS = ["yes", "no"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def box(server, words=WORDS, how=None, **more) -> EndpointLabels:
    task = {"black_box": "endpoint", "model": "m", "base_url": server.url} | more
    options = {"timeout_seconds": 5.0, "retries": 2} | (how or {})
    return EndpointLabels(
        PromptTaskOptions(**task), words, AskOptions(**options), backoff_seconds=0.01
    )


def yes_share(text: str) -> float:
    """A probability of "yes" for a text, from its digest."""
    return 0.05 + hashlib.sha256(text.encode()).digest()[0] / 320


def honest(asked, before=0, **more) -> Said:
    p = yes_share(asked.user)
    shape = content if "messages" in asked.body else classic
    return shape({" yes": math.log(p), " no": math.log(1 - p)}, **more)


def test_it_is_both_kinds_of_box():
    with serving(honest) as server:
        made = box(server)
        assert isinstance(made, RemoteBox) and isinstance(made, BlackBox)
        assert (made.classes, made.written_tokens) == (2, 1)


@pytest.mark.parametrize("protocol", ["completions", "chat"])
def test_what_is_sent_and_what_comes_of_it(protocol, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving(lambda a, n: honest(a, delay=0.001 * (len(a.user) % 7))) as server:
        made = box(
            server,
            how={"api_key_env": "MY_KEY", "concurrency": 4},
            protocol=protocol,
            template="{text} | {prompt}",
            top_logprobs=7,
        )
        got = made.label_logprobs(["is it", ""], ["red", "green {x}", "blue"])
        texts = [
            [f"{row} | is it" for row in ("red", "green {x}", "blue")],
            [f"{row} |" for row in ("red", "green {x}", "blue")],
        ]
        want = [[[yes_share(t), 1 - yes_share(t)] for t in line] for line in texts]
        assert got.shape == (2, 3, 2) and got.dtype == np.float32
        assert np.exp(got) == pytest.approx(np.array(want), rel=1e-5)
        first = server.asked[0]
        common = {"model": "m", "max_tokens": 1, "temperature": 0.0}
        if protocol == "chat":
            assert first.path == "/v1/chat/completions"
            messages = [{"role": "user", "content": "red | is it"}]
            assert first.body == common | {
                "messages": messages,
                "logprobs": True,
                "top_logprobs": 7,
            }
        else:
            assert first.path == "/v1/completions"
            assert first.body == common | {"prompt": "red | is it", "logprobs": 7}
        assert {a.key for a in server.asked} == {"Bearer s3cret"}
        assert sorted(a.user for a in server.asked) == sorted([*texts[0], *texts[1]])
        assert (made.bounded, made.blind, made.unresolved) == (0, 0, 0)


def test_completions_may_come_in_the_shape_of_chats():
    top = {" yes": math.log(0.25), "no": math.log(0.75)}
    for spelt in (True, False):
        with serving(lambda a, n, spelt=spelt: content(top, spelt=spelt)) as server:
            got = box(server).label_logprobs([""], ["x"])
        assert np.exp(got[0, 0]) == pytest.approx([0.25, 0.75])


def test_nothing_asked_nothing_sent():
    with serving(honest) as server:
        made = box(server)
        assert made.label_logprobs([], ["x"]).shape == (0, 1, 2)
        assert made.label_logprobs(["x"], []).shape == (1, 0, 2)
        assert made.input_tokens([], ["x"]).shape == (0, 1)
        assert not server.asked


@pytest.mark.parametrize("protocol", ["completions", "chat"])
def test_the_bound_is_bytes_and_a_frame(protocol):
    with serving(honest) as server:
        made = box(server, protocol=protocol, template="Q: {text} A: {prompt} !")
        prompts, rows = ["", "so", "日本"], ["", "a b", "naïve"]
        got = made.input_tokens(prompts, rows)
    more = 8 + (64 if protocol == "chat" else 0)
    for p, prompt in enumerate(prompts):
        for n, row in enumerate(rows):
            text = f"Q: {row} A: {prompt} !" if prompt else f"Q: {row} A: !"
            assert got[p, n] == len(text.encode()) + more


def test_tokens_are_the_servers_or_the_bound():
    heard = []
    with serving(lambda a, n: classic({" yes": -0.1}, usage=None)) as server:
        made = box(server)
        made.answer_all([("p", "abc")], lambda place, answer: heard.append(answer))
        assert heard[0][1:] == (made.input_tokens(["p"], ["abc"])[0, 0], 1)
    with serving(lambda a, n: classic({" yes": -0.1}, usage=(5, 1))) as server:
        box(server).answer_all([("p", "abc")], lambda place, answer: heard.append(answer))
        assert heard[1][1:] == (5, 1)


def test_a_server_that_counts_more_raises_the_bound_for_good():
    with serving(lambda a, n: classic({" yes": -0.1}, usage=(len(a.user) + 108, 3))) as server:
        made = box(server)
        before = made.input_tokens(["p"], ["abc"])[0, 0]
        heard = []
        made.answer_all([("p", "abc")] * 3, lambda place, answer: heard.append(answer[1]))
        after = made.input_tokens(["p"], ["abc"])[0, 0]
    assert before < heard[0] == after == before + 100
    assert made.written_tokens == 3


def test_bounds_and_blind_replies_are_counted():
    def answer(asked, before):
        if asked.user.startswith("half"):
            return classic({" yes": math.log(0.5), "x": math.log(0.2)})
        if asked.user.startswith("none"):
            return classic({"x": -0.1})
        if asked.user.startswith("end"):  # the model ended at once
            return Said(b'{"choices": [{"logprobs": {"content": []}}]}')
        return honest(asked)

    with serving(answer) as server:
        made = box(server)
        got = np.exp(made.label_logprobs([""], ["full", "half", "none", "end"])[0])
    assert got[1] == pytest.approx([0.5 / 0.7, 0.2 / 0.7])
    assert got[2:] == pytest.approx(np.full((2, 2), 0.5))
    assert (made.bounded, made.blind) == (1, 2)


def test_parts_of_letters_are_blind_and_settle_nothing():
    """llama.cpp gives no log probabilities then: not for lack of them, so the next one tells."""
    part = Said('{"choices": [{"text": "\ufffd", "logprobs": null}]}'.encode())
    told = {"silent": classic(None), "part": part}
    with serving(lambda a, n: told.get(a.user, honest(a))) as server:
        made = box(server)
        got = np.exp(made.label_logprobs([""], ["part", "full", "part"])[0])
        assert got[0] == pytest.approx([0.5, 0.5]) and made.blind == 2
        assert got[1, 0] == pytest.approx(yes_share("full"), rel=1e-5)
        with pytest.raises(InputError, match="no log probabilities for prompt '' on row 'silent'"):
            box(server).label_logprobs([""], ["part", "silent", "full"])
        assert len(server.asked) == 5


def test_words_that_begin_alike_are_told_once():
    with serving(lambda a, n: classic({" pos": -0.1, " neg": -3.0})) as server:
        made = box(server, words=["positive", "possible", "negative"])
        with pytest.warns(PruneryWarning, match="' pos'.*'positive' and 'possible'") as told:
            got = made.label_logprobs([""], ["a", "b"])
    assert len(told) == 1 and made.unresolved == 2
    assert got[0, 0, 0] == got[0, 0, 1] > got[0, 0, 2]


@pytest.mark.parametrize(
    "silent",
    [
        classic(None),
        Said(b'{"choices": [{"text": " yes"}], "usage": {"prompt_tokens": 4}}'),
        Said(b'{"choices": [{"text": "", "logprobs": {"content": []}}]}'),
        # As `transformers serve` 5.23 answers, having ignored the option.
        Said(
            b'{"id":"31f7","choices":[{"finish_reason":"length","index":0,"message":'
            b'{"content":"<","role":"assistant"}}],"created":1795377759,"model":"m",'
            b'"object":"chat.completion","usage":{"completion_tokens":1,"prompt_tokens":4,'
            b'"total_tokens":5}}'
        ),
    ],
)
def test_a_server_without_log_probabilities_is_asked_once(silent):
    with serving(lambda a, n: silent) as server:
        with pytest.raises(InputError, match="no log probabilities.*`top_logprobs`") as caught:
            box(server).label_logprobs(["p"], [str(i) for i in range(20)])
        assert server.url in str(caught.value)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_gives_fewer_than_asked_says_so(status):
    said = Said(b'{"error": "top_logprobs must be at most 5"}', status=status)
    with serving(lambda a, n: said) as server:
        with pytest.raises(InputError, match="refuses.*20 log prob.*at most 5.*`top_logprobs`"):
            box(server, how={"retries": 0}).label_logprobs(["p"], ["a", "b"])
        assert len(server.asked) == 1


def test_log_probabilities_that_cease_are_an_error_and_the_others_kept():
    heard = {}
    with serving(lambda a, n: classic(None) if a.user == "c" else honest(a)) as server:
        made = box(server, how={"concurrency": 1})
        with pytest.raises(InputError, match="no log probabilities for prompt '' on row 'c'"):
            made.answer_all([("", row) for row in "abcde"], heard.__setitem__)
        assert sorted(heard) == [0, 1] and len(server.asked) == 3


def test_a_refused_text_is_named_and_what_is_under_way_is_kept():
    def answer(asked, before):
        if asked.user == "long p":
            return Said(b"context length exceeded", status=400, delay=0.1)
        return honest(asked, delay=0.3)

    heard = {}
    with serving(answer) as server:
        made = box(server, how={"concurrency": 3})
        pairs = [("p", row) for row in ["a", "b", "long", "c", *"defghij"]]
        with pytest.raises(InputError, match="prompt 'p' on row 'long'.*context length"):
            made.answer_all(pairs, heard.__setitem__)
        assert sorted(heard) == [0, 1, 3]  # the first alone, then those beside the long one
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    "bad",
    [
        Said(b"busy", status=503),
        Said(b"slow down", status=429, headers={"Retry-After": "0.05"}),
        Said(b"", hang_up=True),
        Said(b"{not json"),
        Said(b'{"choices": [{"logprobs": {"top_logprobs": [{" yes": 3}]}}]}'),
        Said(b" " * (5 << 20)),
        classic({" yes": -0.1}, delay=3.0),
        classic({" yes": -0.1}, drip=0.05),
    ],
    ids=["503", "429", "hang-up", "not-json", "above-0", "oversize", "late", "drip"],
)
def test_what_passes_is_tried_again(bad):
    with serving(lambda a, n: bad if n == 0 else honest(a)) as server:
        began = time.monotonic()
        made = box(server, how={"timeout_seconds": 0.4})
        got = made.label_logprobs([""], ["x"])[0, 0]
        assert time.monotonic() - began < 2.5
    assert np.exp(got[0]) == pytest.approx(yes_share("x"), rel=1e-5)
    assert (made.ledger.requests, made.ledger.retries) == (2, 1)


def test_what_stays_broken_is_an_error_never_a_score():
    for bad, match in (
        (Said(b"<html>"), "no completion in 3 tries for prompt 'p' on row 'x'"),
        (Said(b"down", status=502), "3 tries.*HTTP 502: down.*kept"),
    ):
        with serving(lambda a, n, bad=bad: bad) as server, pytest.raises(ModelError, match=match):
            box(server).label_logprobs(["p"], ["x"])
    with serving(lambda a, n: Said(b"no such path", status=404)) as server:
        with pytest.raises(InputError, match="404: no such path.*`protocol`"):
            box(server).label_logprobs(["p"], ["x"])
        assert len(server.asked) == 1


def test_answers_are_handed_over_as_they_come():
    """The first answer is there while the server still works on the last."""
    times = {}
    with serving(lambda a, n: honest(a, delay=0.5 if a.user == "slow" else 0.0)) as server:
        pairs = [("", row) for row in ("a", "slow", "b", "c")]
        box(server, how={"concurrency": 2}).answer_all(
            pairs, lambda place, answer: times.__setitem__(place, time.monotonic())
        )
    assert list(times) == [0, 2, 3, 1]
    assert times[1] - times[3] > 0.3


def test_an_error_of_the_receiver_stops_the_work():
    def full(place, answer):
        raise OSError("disk full")

    with serving(honest) as server:
        with pytest.raises(OSError, match="disk full"):
            box(server).answer_all([("", str(i)) for i in range(9)], full)
        assert len(server.asked) == 1


def test_connections_are_kept_from_call_to_call_and_closed_in_the_end():
    with serving(honest, keep_alive=True) as server:
        made = box(server, how={"concurrency": 2})
        for prompt in "abcd":
            made.label_logprobs([prompt], ["x", "y", "z"])
        assert len(server.asked) == 12
        assert server.connections <= 2
        del made
        gc.collect()
        until = time.monotonic() + 5
        while server._now and time.monotonic() < until:
            time.sleep(0.01)
        assert server._now == 0


def test_odd_options_are_refused_by_name():
    class Nowhere:
        url = "ftp://x"

    with pytest.raises(RecipeError, match="base_url.*https://host/v1"):
        box(Nowhere)
    with serving(honest) as server:
        with pytest.raises(RecipeError, match="'nobody' begins with 'no'"):
            box(server, words=["no", "nobody"])
        with pytest.raises(InputError, match="not Unicode"):
            box(server).label_logprobs(["p"], ["\ud800"])
        assert not server.asked


def test_many_small_requests_cost_little():
    """Processor time of client and server together, which a busy machine does not stretch."""
    with serving(honest, keep_alive=True) as server:
        made = box(server, how={"concurrency": 32})
        began = time.process_time()
        made.label_logprobs(["p"], [str(i) for i in range(150)])
        each = (time.process_time() - began) / 150
        assert server.connections <= 32
    assert each < 0.02, each
