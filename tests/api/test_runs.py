"""Runs over HTTP: against a scripted Prefect for what goes wrong, a real one for the rest."""

import asyncio
import json
import time
from uuid import uuid4

import httpx
import pytest
from starlette.testclient import TestClient

from prunery.api import prefect_api, runs
from prunery.api.prefect_api import Prefect
from prunery.api.run_settings import overrides_of
from prunery.api.run_view import full_run, snapshot
from prunery.errors import InputError
from prunery.storage import Store

from .live import application, live
from .prefect_server import prefect_server, served_recipe

RUN, DEPLOYMENT = str(uuid4()), str(uuid4())
DEPLOYED = {
    "id": DEPLOYMENT, "name": "nightly", "tags": ["prunery", "rag"], "paused": False,
    "parameters": {"recipe": "rag", "overrides": ["seed=2"], "store": "/s"},
    "schedules": [{"active": True, "schedule": {"cron": "0 4 * * *", "timezone": "UTC"}}],
}  # fmt: skip


def stamped(kind, second, **more):
    state = {"type": kind, "name": kind.title(), "timestamp": f"2030-01-01T00:00:{second:02}Z"}
    return {"state": state, "run_count": 1, **more}


class Scripted:
    """A Prefect that gives what `answers` says of a path, and keeps what it was asked."""

    def __init__(self, **answers):
        self.asked = []
        self.answers = {"/deployments/filter": [DEPLOYED], **answers}

    def __call__(self, request):
        path = request.url.path.removeprefix("/api")
        self.asked.append((path, json.loads(request.content)))
        answer = self.answers.get(path)
        if answer is None:
            answer = self.answers.get("/…" + path.rpartition("/")[2], [])
        answer = answer(len(self.asked)) if callable(answer) else answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)


def scripted_prefect(scripted):
    made = Prefect("http://prefect.invalid/api", "secret")
    made._client = httpx.AsyncClient(
        base_url="http://prefect.invalid/api", transport=httpx.MockTransport(scripted)
    )
    return made


def client_of(scripted, **settings):
    app = application(prefect_url="http://prefect.invalid/api", **settings)
    app.state.following = runs.Following()
    app.state.following.prefect = scripted_prefect(scripted)
    return TestClient(app, base_url="http://127.0.0.1")


def test_numbers_and_names_of_methods_may_be_set():
    given = {
        "prune.threshold": 0.2,
        "prune.method": "cosine",
        "seed": 3,
        "x.flag": True,
        "x.n": None,
    }
    assert overrides_of(given) == [
        "prune.threshold=0.2", 'prune.method="cosine"', "seed=3", "x.flag=true", "x.n=null",
    ]  # fmt: skip
    assert overrides_of({"prune.on_empty": "top1"}) == ['prune.on_empty="top1"']
    assert overrides_of({"s.signals": ["provence", "cosine"]})


@pytest.mark.parametrize(
    "settings",
    [{"chunks.path": "/etc/passwd"}, {"signals.model": "someone/model"}, {"vectors.encoder": "x"},
     {"prune.method": "/tmp/x"}, {"recipe": "/tmp/x.yaml"}, {"store": "s3://x"}, {"a.b": {"c": 1}},
     {"chunks.path": ["/etc/passwd"]}, {"a.b=1\nchunks.path": 1}, {"__prefect_kind": "jinja"},
     {"a.b.c": 1}, {"report.title": "x"}, {"name": 1}, {"a.b": [[1]]},
     {f"a.b{i}": 1 for i in range(101)}],
)  # fmt: skip
def test_places_and_models_may_not(settings):
    with pytest.raises(InputError):
        overrides_of(settings)


def test_starting_adds_to_the_overrides_of_the_deployment():
    prefect = Scripted(**{"/…create_flow_run": {"id": RUN, "name": "n", "deployment_id": DEPLOYMENT,
                                                **stamped("SCHEDULED", 1)}})  # fmt: skip
    client = client_of(prefect)
    body = {"deployment": "nightly", "parameters": {"prune.threshold": 0.3}, "workers": 2}
    answer = client.post("/v1/runs", json=body, headers={"Idempotency-Key": "once"})
    assert answer.status_code == 202
    assert (answer.json()["id"], answer.json()["deployment"]) == (RUN, "nightly")
    path, sent = prefect.asked[-1]
    assert path == f"/deployments/{DEPLOYMENT}/create_flow_run"
    assert sent["parameters"] == {"overrides": ["seed=2", "prune.threshold=0.3"], "workers": 2}
    assert sent["idempotency_key"] == "once"
    assert prefect.asked[0][1]["deployments"] == {"tags": {"all_": ["prunery"]}}
    for wanted in ({"recipe": "rag"}, {"deployment": DEPLOYMENT}):
        assert client.post("/v1/runs", json=wanted).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [({"deployment": "other"}, 404, "deployed: nightly"), ({}, 422, "one of them"),
     ({"deployment": "nightly", "recipe": "rag"}, 422, "one of them"),
     ({"recipe": "/etc/passwd"}, 404, "prunery deploy"),
     ({"deployment": "nightly", "parameters": {"chunks.path": "/"}}, 422, "file or a model"),
     ({"deployment": "nightly", "extra": 1}, 422, ""), ({"deployment": 5}, 422, ""),
     ({"deployment": "nightly", "workers": 0}, 422, "")],
)  # fmt: skip
def test_what_cannot_be_started_is_said(body, status, words):
    prefect = Scripted()
    answer = client_of(prefect).post("/v1/runs", json=body)
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert not [path for path, _ in prefect.asked if "create_flow_run" in path]


def test_twice_deployed_or_paused_is_a_conflict():
    twice = Scripted(**{"/deployments/filter": [DEPLOYED, {**DEPLOYED, "id": str(uuid4())}]})
    assert client_of(twice).post("/v1/runs", json={"recipe": "rag"}).status_code == 409
    paused = Scripted(**{"/deployments/filter": [{**DEPLOYED, "paused": True}]})
    assert client_of(paused).post("/v1/runs", json={"recipe": "rag"}).status_code == 409


def refused(request):
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answer", "words"),
    [(refused, "prefect server start"), (httpx.Response(503, text="no"), "answers 503"),
     (httpx.Response(401), "token"), (httpx.Response(200, text="<html>"), "/api"),
     (httpx.Response(200, json={"a": 1}), "no list")],
)  # fmt: skip
def test_a_prefect_that_is_down_is_said(answer, words, monkeypatch):
    monkeypatch.setattr(prefect_api, "_PAUSES", (0.01,))
    handler = answer if callable(answer) else (lambda _: answer)
    client = client_of(handler)
    for path in ("/v1/runs", "/v1/deployments", f"/v1/runs/{RUN}", f"/v1/runs/{RUN}/events"):
        got = client.get(path)
        assert got.status_code == 502 and words in got.json()["error"]["message"], path
        assert "secret" not in got.text


def test_a_busy_prefect_is_asked_again_and_starts_one_run(monkeypatch):
    monkeypatch.setattr(prefect_api, "_PAUSES", (0.01, 0.01, 0.01))
    busy = iter([503, 429, 502])

    def create(_):
        if (status := next(busy, None)) is not None:
            return httpx.Response(status, text="database is locked")
        return {"id": RUN, "name": "n", "deployment_id": DEPLOYMENT, **stamped("SCHEDULED", 1)}

    prefect = Scripted(**{"/…create_flow_run": create})
    assert client_of(prefect).post("/v1/runs", json={"recipe": "rag"}).status_code == 202
    sent = [body for path, body in prefect.asked if "create_flow_run" in path]
    assert len(sent) == 4 and len({body["idempotency_key"] for body in sent}) == 1


def test_without_prefect_it_says_what_to_do():
    answer = TestClient(application(), base_url="http://127.0.0.1").get("/v1/runs")
    assert answer.status_code == 404 and "--prefect-url" in answer.json()["error"]["message"]


def test_a_run_of_another_flow_is_not_shown():
    client = client_of(Scripted())
    for path in ("", "/events", "/logs"):
        assert client.get(f"/v1/runs/{RUN}{path}").status_code == 404
    assert client.post(f"/v1/runs/{RUN}/cancel").status_code == 404
    assert client.get("/v1/runs/..%2f..%2fadmin").status_code in (404, 422)


def test_steps_have_progress_and_tables(small_store):
    key = small_store.resolve("chunks")
    task = {"id": "t", "name": "chunks", **stamped("COMPLETED", 2)}
    other = {"id": "u", "name": "vectors", **stamped("RUNNING", 3)}
    artifacts = [
        {"type": "progress", "data": 40.0, "task_run_id": "u"},
        {"type": "progress", "data": 10.0, "task_run_id": "u"},
        {"type": "table", "data": json.dumps([{"step": "chunks", "key": key[:12]}])},
        {"type": "table", "data": "broken"},
        {"type": "table", "data": json.dumps([{"step": "vectors", "key": "f" * 12}])},
    ]
    run = {"id": RUN, "name": "n", "parameters": {"recipe": "rag"}, **stamped("RUNNING", 1)}
    made = full_run(run, [task, other], artifacts, {})
    assert [one["progress"] for one in made["steps"]] == [100.0, 40.0]
    prefect = Scripted(**{"/flow_runs/filter": [run], "/task_runs/filter": [task, other],
                          "/artifacts/filter": artifacts})  # fmt: skip
    told = client_of(prefect, store=str(small_store.uri)).get(f"/v1/runs/{RUN}").json()
    assert [one["table"] for one in told["steps"]] == [key, None]
    assert told["steps_total"] == 12


def heard(text):
    """(event, id, data) of a stream."""
    made = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            made.append((fields.get("event"), fields.get("id"), json.loads(fields["data"])))
    return made


def changing():
    """A run that begins, goes on and ends, one look at a time."""
    steps = [{"id": "t", "name": "chunks", **stamped("RUNNING", 2)}]
    looks = [("PENDING", []), ("PENDING", []), ("RUNNING", steps),
             ("COMPLETED", [{**steps[0], **stamped("COMPLETED", 4)}])]  # fmt: skip
    at = {"run": 0, "tasks": 0}

    def run(_):
        look = looks[min(at["run"], 3)]
        at["run"] += 1
        return [{"id": RUN, "name": "n", **stamped(look[0], min(at["run"], 5))}]

    def tasks(_):
        # The first question about the run comes before the stream begins.
        look = looks[min(at["tasks"] + 1, 3)]
        at["tasks"] += 1
        return look[1]

    return Scripted(**{"/flow_runs/filter": run, "/task_runs/filter": tasks})


def test_events_tell_each_change_once_and_end(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    answer = client_of(changing()).get(f"/v1/runs/{RUN}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = heard(answer.text)
    assert [(name, data["state"]) for name, _, data in events] == [
        ("run", "Pending"), ("step", "Running"), ("run", "Running"),
        ("step", "Completed"), ("run", "Completed"), ("end", "Completed"),
    ]  # fmt: skip
    ids = [int(number) for name, number, _ in events if name != "end"]
    assert ids == sorted(ids)


def test_a_follower_that_comes_back_is_not_told_old_news(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    run = {"id": RUN, "name": "n", **stamped("COMPLETED", 9)}
    old = {"id": "t", "name": "old", **stamped("COMPLETED", 0)}
    old["state"]["timestamp"] = "2029-12-31T00:00:00Z"
    prefect = Scripted(**{"/flow_runs/filter": [run], "/task_runs/filter": [old]})
    (last,) = [item.at for item in snapshot(run, [], [])]
    path = f"/v1/runs/{RUN}/events"
    again = client_of(prefect).get(path, headers={"Last-Event-ID": str(last)})
    assert [name for name, _, _ in heard(again.text)] == ["run", "end"]
    for wrong in ("x", "-1", "١", "9" * 41):
        answer = client_of(prefect).get(path, headers={b"Last-Event-ID": wrong.encode()})
        assert answer.status_code in (200, 422), wrong


def test_a_lost_prefect_is_told_and_the_stream_goes_on(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    looks = iter(["RUNNING", "RUNNING", None, None, "COMPLETED"])

    def run(_):
        kind = next(looks)
        if kind is None:
            return httpx.Response(500, text="down")
        return [{"id": RUN, "name": "n", **stamped(kind, 1)}]

    answer = client_of(Scripted(**{"/flow_runs/filter": run})).get(f"/v1/runs/{RUN}/events")
    assert [name for name, _, _ in heard(answer.text)] == ["run", "problem", "run", "end"]


def test_streams_are_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(runs, "FOLLOWERS", 1)
    client = client_of(changing())
    assert client.get(f"/v1/runs/{RUN}/events").status_code == 200
    assert client.app.state.following.streams == 0
    client.app.state.following.streams = 1
    full = client.get(f"/v1/runs/{RUN}/events")
    assert full.status_code == 429 and full.headers["retry-after"]


def test_a_stream_ends_when_the_service_stops(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    run = {"id": RUN, "name": "n", **stamped("RUNNING", 1)}
    client = client_of(Scripted(**{"/flow_runs/filter": [run]}))
    client.app.state.service.state = "draining"
    assert heard(client.get(f"/v1/runs/{RUN}/events").text) == []


def test_cancelling_what_has_ended_is_a_conflict():
    ended = Scripted(**{"/flow_runs/filter": [{"id": RUN, "state_type": "COMPLETED"}]})
    assert client_of(ended).post(f"/v1/runs/{RUN}/cancel").status_code == 409
    stubborn = Scripted(**{
        "/flow_runs/filter": [{"id": RUN, "state_type": "RUNNING"}],
        "/…set_state": {"state": {"type": "RUNNING"}, "details": {"reason": "no"}},
    })  # fmt: skip
    answer = client_of(stubborn).post(f"/v1/runs/{RUN}/cancel")
    assert answer.status_code == 409 and "no." in answer.json()["error"]["message"]


@pytest.mark.timeout(600)
def test_a_real_deployment_is_started_followed_and_cancelled(tmp_path):
    pytest.importorskip("prefect")
    store = Store(tmp_path / "store")
    store.backend.replace("names/.keep", b"")
    with prefect_server(tmp_path) as url:
        app = application(prefect_url=url, store=str(store.uri))
        with live(app) as base, httpx.Client(base_url=base, timeout=60) as client:
            assert client.get("/v1/deployments").json() == {"deployments": []}
            with served_recipe(tmp_path, url, store.uri):
                (deployed,) = client.get("/v1/deployments").json()["deployments"]
                assert (deployed["name"], deployed["recipe"]) == ("tiny", "tiny")
                body = {"deployment": "tiny", "parameters": {"chunks.max_tokens": 30}}
                started = client.post("/v1/runs", json=body)
                assert started.status_code == 202, started.text
                run_id = started.json()["id"]
                events = asyncio.run(_followed(f"{base}/v1/runs/{run_id}/events"))
                made = client.get(f"/v1/runs/{run_id}").json()
                assert events[-1][0] == "end" and made["state_type"] == "COMPLETED", made
                assert ("step", "Completed") in {(n, d["state"]) for n, _, d in events}
                assert made["steps"][0]["table"] == store.resolve("chunks")
                assert store.manifest("chunks").options["max_tokens"] == 30
                assert run_id in [one["id"] for one in client.get("/v1/runs").json()["runs"]]
                assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 409
            # Nothing serves it now: the run waits, and is cancelled.
            waiting = client.post("/v1/runs", json={"deployment": "tiny"}).json()["id"]
            cancelled = client.post(f"/v1/runs/{waiting}/cancel")
            assert cancelled.status_code == 202, cancelled.text
            assert client.get(f"/v1/runs/{waiting}").json()["state_type"] == "CANCELLED"
        assert client.is_closed


async def _followed(url):
    text, end = "", time.monotonic() + 240
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", url) as answer:
        async for part in answer.aiter_text():
            text += part
            assert time.monotonic() < end, text
    return heard(text)
