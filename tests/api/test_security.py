"""The guard around all routes: keys, hosts, bodies, headers, errors."""

import asyncio
import logging
import time

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from prunery.api.errors import Busy
from prunery.api.metrics import Metrics
from prunery.api.security import add_security
from prunery.api.service import Service
from prunery.api.settings import Limits, Settings
from prunery.errors import InputError, ModelError

KEY, OTHER = "k" * 24, "o" * 24


class Body(BaseModel):
    name: str
    numbers: list[int] = []


def guarded(**settings):
    """An application with a few routes and no model, behind the guard."""
    limits = settings.pop("limits", Limits(body_bytes=1000, passages=10, seconds=1.0))
    made = FastAPI(docs_url=None, redoc_url=None)
    service = Service(settings=Settings(limits=limits, **settings), metrics=Metrics())
    made.state.service = service
    add_security(made, service)

    @made.post("/v1/echo")
    async def echo(body: Body) -> dict[str, str]:
        return {"name": body.name}

    @made.get("/v1/fails/{how}")
    async def fails(how: str) -> None:
        raise {"busy": Busy("full", 2.2), "model": ModelError("no"), "bug": KeyError("secret")}[how]

    @made.post("/rerank")
    async def tei() -> None:
        raise InputError("wrong")

    @made.post("/v2/rerank")
    async def cohere() -> None:
        raise ZeroDivisionError

    @made.get("/")
    @made.get("/page/page.js")
    @made.get("/healthz")
    @made.get("/v1/reports/x")
    async def text() -> PlainTextResponse:
        return PlainTextResponse("here")

    @made.get("/v1/stream")
    async def stream() -> StreamingResponse:
        async def parts():
            yield b"one"
            raise RuntimeError("in the middle")

        return StreamingResponse(parts())

    return made


class Asker:
    """Asks an application in this process, a loop a request."""

    def __init__(self, app, base="http://127.0.0.1:8080"):
        self.app, self.base = app, base

    def __call__(self, method, path, **request):
        async def ask():
            # Errors must come as answers: raise_app_exceptions would hide a missing one.
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=self.base) as client:
                return await client.request(method, path, **request)

        return asyncio.run(ask())


@pytest.fixture
def ask():
    return Asker(guarded())


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# two of them\n{KEY}\n\n{OTHER}\n")
    return path


@pytest.fixture
def locked(keys):
    return Asker(guarded(keys_file=keys))


def post(ask, content, **headers):
    headers = {"content-type": "application/json", **headers}
    return ask("POST", "/v1/echo", content=content, headers=headers)


def test_a_proper_body_passes(ask):
    answer = post(ask, b'{"name": "a", "name": "b"}')
    assert answer.json() == {"name": "b"}  # the last of equal names, as parsers have it


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"name": NaN}',
        b'{"name": -Infinity}',
        b'{"name": "\xff"}',
        b'{"name": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"name": "a"}'.encode("utf-16"),
        b'{"numbers": [' + b"9" * 900 + b"]}",
        b"[" * 900,
        b"[" * 190 + b"]" * 190,
        b"null",
        b'"text"',
        b'{"name": "a"} trailing',
        b'{"name": 1e999}',
    ],
)
def test_hostile_json_is_refused_and_never_an_error_of_ours(ask, body):
    answer = post(ask, body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["message"]


def test_deep_nesting_past_the_parser(ask):
    deep = guarded(limits=Limits(body_bytes=2_000_000))
    answer = post(Asker(deep), b'{"name":' + b"[" * 500_000 + b"]" * 500_000 + b"}")
    assert answer.status_code == 400
    assert "recursion" in answer.text


def test_what_was_found_is_shown_shortened(ask):
    answer = post(ask, b'{"numbers": ["' + b"x" * 600 + b'"], "name": {"a": 1}}')
    details = answer.json()["error"]["details"]
    assert {len(one["input"]) for one in details} <= {200, len("dict of 1")}
    assert "body.name" in answer.json()["error"]["message"]


def test_a_long_list_is_refused_before_each_entry_is_checked(ask):
    answer = post(ask, b'{"numbers": [' + b"1," * 10 + b"1]}")
    assert answer.status_code == 413
    assert "`numbers` has 11 entries; 10 are allowed" in answer.text


def test_a_body_past_the_limit_by_its_own_account(ask):
    answer = post(ask, b'{"name": "' + b"x" * 1000 + b'"}')
    assert answer.status_code == 413
    assert "1012 bytes" in answer.text


def test_a_body_past_the_limit_while_it_streams_in(ask):
    sent = 0

    async def parts():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 100

    answer = post(ask, parts())
    assert answer.status_code == 413
    assert sent <= 55  # what follows is not taken in without end


def test_a_body_that_never_ends_is_given_up(ask):
    async def parts():
        yield b"{"
        await asyncio.sleep(30)
        yield b"}"

    began = time.monotonic()
    assert post(ask, parts()).status_code == 408
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_compressed_bodies_are_refused(ask, encoding):
    answer = post(ask, b"\x1f\x8b", **{"content-encoding": encoding})
    assert answer.status_code == 415


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(ask, kind):
    answer = post(ask, b'{"name": "a"}', **{"content-type": kind})
    assert answer.status_code == 415


def test_a_client_that_leaves_while_sending(ask):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/echo", "raw_path": b"/v1/echo",
        "headers": [(b"host", b"127.0.0.1")], "query_string": b"", "server": ("127.0.0.1", 1),
    }  # fmt: skip
    asyncio.run(ask.app(scope, receive, send))
    assert sent == []


def test_names_that_are_not_this_machines_are_refused_without_keys(ask, locked):
    for host in ("127.0.0.1:8080", "localhost", "[::1]:9", "LOCALHOST:1", "127.0.0.1.:2"):
        assert ask("GET", "/healthz", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1"):
        answer = ask("GET", "/healthz", headers={"host": host})
        assert answer.status_code == 403, host
    key = {"authorization": f"Bearer {KEY}"}
    answer = locked("GET", "/v1/fails/model", headers={"host": "prunery.example", **key})
    assert answer.status_code == 424


def test_posts_of_other_sites_pages_are_refused(ask):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
        assert post(ask, b'{"name": "a"}', origin=origin).status_code == 403, origin
    assert post(ask, b'{"name": "a"}', origin="http://127.0.0.1:8080").status_code == 200


def test_a_preflight_allows_nothing(ask):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = ask("OPTIONS", "/v1/echo", headers=headers)
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert answer.status_code == 405


def test_keys(locked):
    assert locked("GET", "/v1/fails/model").status_code == 401
    for headers in (
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {OTHER}"},
        {"x-api-key": OTHER},
    ):
        assert locked("GET", "/v1/fails/model", headers=headers).status_code == 424
    for headers in (
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer "},
        {"x-api-key": "é" * 20},
        {"x-api-key": "# two of them"},
    ):
        raw = {name: value.encode() for name, value in headers.items()}
        answer = locked("GET", "/v1/fails/model", headers=raw)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "unauthorised"


def test_what_holds_no_data_is_open(locked):
    for path in ("/", "/healthz", "/page/page.js"):
        assert locked("GET", path).status_code == 200
    for path in ("/metrics", "/openapi.json", "/v1/reports/x", "/page", "/page/../rerank"):
        assert locked("GET", path).status_code in (401, 404), path
    assert locked("GET", "/openapi.json").status_code == 401


def test_keys_rotate_without_a_restart(locked, keys, caplog):
    def status(key):
        return locked("GET", "/v1/fails/model", headers={"x-api-key": key}).status_code

    assert (status(KEY), status(OTHER)) == (424, 424)
    new = "n" * 30
    caplog.set_level(logging.INFO)
    keys.with_name("next").write_text(f"{new}\n{OTHER}\n")
    keys.with_name("next").rename(keys)
    assert (status(KEY), status(OTHER), status(new)) == (401, 424, 424)
    keys.write_text("short\n")
    assert (status(OTHER), status(new), status("short")) == (401, 401, 401)
    keys.unlink()
    assert status(new) == 401
    keys.write_text(f"{new}\n")
    assert status(new) == 424
    assert not any(key in caplog.text for key in (new, OTHER, KEY, "short\n"))


@pytest.mark.parametrize("content", ["", "# none\n", "short\n", "with space in it here\n", None])
def test_a_start_with_bad_keys_is_refused(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        guarded(keys_file=path)
    assert "short" not in str(caught.value).replace("too short", "")


def test_security_headers(ask):
    page = ask("GET", "/").headers
    assert "script-src 'self'" in page["content-security-policy"]
    assert "unsafe-inline" not in page["content-security-policy"]
    api = ask("GET", "/v1/fails/model").headers
    assert api["content-security-policy"].startswith("default-src 'none'")
    assert api["cache-control"] == "no-store"
    assert api["x-content-type-options"] == "nosniff"
    assert api["referrer-policy"] == "no-referrer"
    report = ask("GET", "/v1/reports/x").headers["content-security-policy"]
    assert report.startswith("sandbox;")
    assert "script" not in report


def test_request_ids(ask):
    assert ask("GET", "/").headers["x-request-id"] != ask("GET", "/").headers["x-request-id"]
    given = ask("GET", "/", headers={"x-request-id": "trace-1"})
    assert given.headers["x-request-id"] == "trace-1"
    forged = ask("GET", "/", headers={"x-request-id": "a b<script>"})
    assert "script" not in forged.headers["x-request-id"]


def test_errors_of_ours(ask):
    busy = ask("GET", "/v1/fails/busy")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    assert busy.json()["error"] == {"type": "overloaded", "message": "full", "details": []}
    assert ask("GET", "/v1/nothing").json()["error"]["type"] == "not_found"
    answer = ask("GET", "/v1/echo")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_errors_in_the_dialects(ask):
    assert ask("POST", "/rerank").json() == {"error": "wrong", "error_type": "Validation"}
    made = ask("POST", "/v2/rerank")
    assert made.json()["id"] == made.headers["x-request-id"]


def test_a_bug_is_logged_by_id_and_tells_nothing(ask, caplog):
    answer = ask("GET", "/v1/fails/bug")
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text
    number = answer.headers["x-request-id"]
    assert number in answer.json()["error"]["message"]
    assert number in caplog.text and "secret" in caplog.text
    assert answer.headers["content-security-policy"]


def test_a_stream_that_breaks_is_cut_off(ask):
    async def read():
        transport = httpx.ASGITransport(ask.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/v1/stream")

    with pytest.raises(RuntimeError, match="in the middle"):
        asyncio.run(read())
