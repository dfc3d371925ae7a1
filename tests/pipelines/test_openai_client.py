"""The chat client against a real HTTP server on the loopback that behaves and misbehaves."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from prunery.errors import BudgetError, InputError, ModelError, PruneryWarning
from prunery.pipelines.openai_client import (
    ChatClient,
    ChatFailure,
    ChatReply,
    Endpoint,
    retry_after,
)

from .chat_server import Said, reply, serving


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def endpoint(server, **more) -> Endpoint:
    given = {"backoff_seconds": 0.01, "timeout_seconds": 5.0, "retries": 2} | more
    return Endpoint(base_url=server.url, model="m", **given)


def messages(text: str):
    return [{"role": "user", "content": text}]


def ask(server, *texts, **more):
    client = ChatClient(endpoint(server, **more))
    return client, client.ask_all([messages(text) for text in texts])


def test_replies_come_in_order_with_key_counts_and_bounded_concurrency(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    wait = {"q0": 0.15}
    with serving(lambda a, n: reply(f"to {a.user}", delay=wait.get(a.user, 0.02))) as server:
        client, got = ask(
            server,
            *[f"q{i}" for i in range(12)],
            concurrency=3,
            api_key_env="MY_KEY",
            seed=5,
            input_price=1.0,
            output_price=10.0,
        )
    assert [r.text for r in got] == [f"to q{i}" for i in range(12)]
    assert server.most_at_once == 3
    first = server.asked[0]
    assert first.path == "/v1/chat/completions"
    assert first.key == "Bearer s3cret"
    assert (first.body["model"], first.body["temperature"], first.body["seed"]) == ("m", 0.0, 5)
    assert client.ledger.requests == client.ledger.replies == 12
    assert client.ledger.cost(client.endpoint) == pytest.approx(12 * (100 + 10 * 10) / 1e6)


def test_no_key_no_header_and_unknown_usage_is_none():
    with serving(lambda a, n: reply("x", usage=None)) as server:
        client, got = ask(server, "q")
    assert server.asked[0].key is None
    assert got == [ChatReply("x", "stop", None, None)]
    assert client.ledger.unpriced == 1
    assert client.ledger.cost(client.endpoint) is None


def test_a_null_content_is_an_empty_reply():
    with serving(lambda a, n: reply(None, finish="content_filter")) as server:
        _, got = ask(server, "q")
    assert (got[0].text, got[0].finish_reason) == ("", "content_filter")


@pytest.mark.parametrize(
    "bad",
    [
        Said(b"oops", status=500),
        Said(b"busy", status=503),
        Said(b"slow down", status=429),
        Said(b"", hang_up=True),
        Said(b"{not json"),
        Said(b"[]"),
        Said(b'{"choices": []}'),
        Said(b'{"choices": [{"message": {"content": [1]}}]}'),
    ],
)
def test_what_passes_is_tried_again(bad):
    with serving(lambda a, n: bad if n < 2 else reply("at last")) as server:
        client, got = ask(server, "q")
    assert got[0].text == "at last"
    assert got[0].requests == 3
    assert client.ledger.retries == 2


def test_retry_after_is_honoured_by_everybody():
    def answer(asked, before):
        if asked.user == "q0" and not before:
            return Said(b"", status=429, headers={"Retry-After": "0.6"})
        return reply("ok", delay=0.05)

    with serving(answer) as server:
        _, got = ask(server, "q0", "q1", "q2", "q3", concurrency=2)
        assert [r.text for r in got] == ["ok"] * 4
        refused = server.asked[0].at
        later = [a.at - refused for a in server.asked[2:]]
    # The one already under way beside it aside, nobody asks again before the time is up.
    assert min(later) >= 0.55


def test_a_wait_longer_than_allowed_stops_with_the_number():
    with serving(lambda a, n: Said(b"", status=429, headers={"Retry-After": "900"})) as server:
        with pytest.raises(ModelError, match="wait 900 s.*longest_wait_seconds"):
            ask(server, "q")
        assert len(server.asked) == 1


@pytest.mark.parametrize("slow", [reply("late", delay=3.0), reply("late", drip=0.05)])
def test_a_try_is_bounded_as_a_whole(slow):
    with serving(lambda a, n: slow if n == 0 else reply("quick")) as server:
        began = time.monotonic()
        _, got = ask(server, "q", timeout_seconds=0.3)
        assert got[0].text == "quick"
        assert time.monotonic() - began < 2.5


def test_an_endpoint_that_stays_away_is_an_error_never_a_reply():
    with serving(lambda a, n: Said(b"down", status=502)) as server:
        with pytest.raises(ModelError, match="3 tries.*HTTP 502: down"):
            ask(server, "q")
        assert len(server.asked) == 3
        url = server.url
    gone = Endpoint(base_url=url, model="m", retries=1, backoff_seconds=0.0)
    with pytest.raises(ModelError, match="2 tries.*Connect"):
        ChatClient(gone).ask_all([messages("q")])


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_the_user_must_mend_stops_at_once_without_the_key(monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with serving(lambda a, n: Said(b"no such model", status=status)) as server:
        with pytest.raises(InputError, match=f"HTTP {status}: no such model") as caught:
            ask(server, "q", concurrency=1)
        assert "s3cret" not in str(caught.value)
        assert len(server.asked) == 1


def test_an_error_ends_the_waits_of_the_others():
    def answer(asked, before):
        if asked.user == "throttled":
            return Said(b"", status=429, headers={"Retry-After": "60"})
        return Said(b"no such key", status=401, delay=0.3)

    with serving(answer) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match="401"):
            ask(server, "throttled", "refused", "never", concurrency=2)
        assert time.monotonic() - began < 10
        assert sorted(a.user for a in server.asked) == ["refused", "throttled"]


def test_one_refused_or_broken_prompt_does_not_stop_the_others():
    def answer(asked, before):
        if asked.user == "long":
            return Said(b"context too long", status=400)
        return Said(b"<html>") if asked.user == "broken" else reply("ok")

    with serving(answer) as server:
        client, got = ask(server, "long", "broken", "fine")
    assert got[0] == ChatFailure("refused", "HTTP 400: context too long", 1)
    assert isinstance(got[1], ChatFailure)
    assert (got[1].reason, got[1].requests) == ("malformed", 3)
    assert got[2].text == "ok"
    assert client.ledger.requests == 5


def test_a_budget_stops_before_the_next_request():
    with serving(lambda a, n: reply("x")) as server:
        more = {"concurrency": 1, "input_price": 100.0, "output_price": 0.0, "max_cost": 0.03}
        with pytest.raises(BudgetError, match="after 3 replies"):
            ask(server, *"abcdef", **more)
        assert len(server.asked) == 3  # 100 tokens at 100 a million are 0.01 each
    with pytest.raises(InputError, match="input_price"):
        ChatClient(endpoint(server, max_cost=1.0))


def test_servers_that_want_other_fields_get_them():
    with serving(lambda a, n: reply("x")) as server:
        ask(server, "q", temperature=None, max_tokens=None, extra={"max_completion_tokens": 9})
    assert set(server.asked[0].body) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize("url", ["ftp://x", "x/v1", "http://u:p@h/v1", "https://h/v1?key=1"])
def test_odd_urls_are_refused(url):
    with pytest.raises(ValidationError, match="base_url"):
        Endpoint(base_url=url, model="m")


def test_a_key_in_clear_text_is_warned_about(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with pytest.warns(PruneryWarning, match="clear text"):
        ChatClient(Endpoint(base_url="http://far.example/v1", model="m"))


def test_retry_after_header():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after("-3") == 0.0
    assert retry_after("1.5") == 1.5
    assert retry_after("Thu, 01 Jan 2026 00:00:30 GMT", now=now) == 30.0
