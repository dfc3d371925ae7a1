"""Who may ask, how much, and what every answer carries: one ASGI layer around all routes.

It is plain ASGI, so that streams flow through it and a client that goes away is noticed.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import PruneryError
from .bodies import check_json, replay, take_body
from .errors import ServiceError, Unauthorised, body_of, status_of
from .keys import ApiKeys
from .service import Service
from .settings import is_loopback

logger = logging.getLogger(__name__)

OPEN = frozenset({"/", "/healthz", "/readyz", "/favicon.ico"})
"""Answered without a key; so is all under /page/, which holds no data of anyone's."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})

_API_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
# Reports hold what passages say: no scripts, no origin, nothing loaded.
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# text-embeddings-inference names its errors in an enum of six.
_TEI_KINDS = {
    "empty": "Empty",
    "overloaded": "Overloaded",
    "unavailable": "Unhealthy",
    "model": "Backend",
    "timeout": "Backend",
    "internal": "Backend",
}


class Foreign(ServiceError):
    """A web page of another site is behind the request: 403."""

    status = 403
    kind = "foreign"


def add_security(app: FastAPI, service: Service) -> None:
    """Put the guard around an application and turn its errors into each dialect's JSON.

    Raises InputError where the settings' keys cannot be read.
    """
    path = service.settings.keys_file
    app.add_middleware(Guard, service=service, keys=None if path is None else ApiKeys(path))
    app.add_exception_handler(PruneryError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


class Guard:
    """Keys, hosts, body limits, strict JSON, security headers, and the last catch of errors."""

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None) -> None:
        self._app = app
        self._settings = service.settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; a web socket is refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, scope["path"], request_id)
        try:
            self._check_site(scope, headers)
            self._check_key(scope["path"], headers)
            passed = await self._take(scope, receive, headers)
            if passed is not None:
                await self._app(scope, passed, answer)
        except PruneryError as error:
            if answer.started:
                raise
            await _answer_to(scope, error)(scope, receive, answer)
        except Exception:
            logger.exception("request %s failed", request_id)
            if answer.started:
                raise
            message = f"something failed here; its record is under id {request_id}."
            await _response(scope, 500, "internal", message)(scope, receive, answer)

    def _check_site(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Keep out other sites' pages, where no key does: rebound names and forged posts."""
        if self._keys is not None:
            return
        host = headers.get("host", "")
        name = _host_name(host)
        own = {self._settings.host, str((scope.get("server") or ("",))[0])}
        if name and name not in own and not is_loopback(name):
            raise Foreign(
                f"this service answers to this machine's own names, not to `{name:.100}`."
                " Ask 127.0.0.1, or start it with API keys (--keys FILE)."
            )
        origin = headers.get("origin")
        if origin is None or scope["method"] in READING:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise Foreign(
                f"a page of `{origin:.100}` asks `{host:.100}`; only this service's own page may."
            )

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._keys is None or path in OPEN or path.startswith("/page/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not self._keys.accepts(given.strip()):
            found = "an unknown one" if given.strip() else "none"
            raise Unauthorised(
                "expected an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`;"
                f" found {found}.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _take(
        self, scope: Scope, receive: Receive, headers: Mapping[str, str]
    ) -> Receive | None:
        if scope["method"] in READING:
            return receive
        limits = self._settings.limits
        body = await take_body(receive, headers, limits)
        if body is None:
            return None
        if body:
            check_json(body, headers, limits)
        return replay(body, receive)


class _Answer:
    """A `send` that adds the headers of every answer, and knows whether one has begun."""

    def __init__(self, send: Send, path: str, request_id: str) -> None:
        self._send = send
        self._path = path
        self._request_id = request_id
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            headers.setdefault("Content-Security-Policy", _policy(self._path))
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


def _policy(path: str) -> str:
    if path == "/" or path.startswith("/page/"):
        return _PAGE_POLICY
    return _REPORT_POLICY if path.startswith("/v1/reports/") else _API_POLICY


def _request_id(headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _answer_to(scope: Scope, error: PruneryError) -> JSONResponse:
    status, kind = status_of(error)
    headers = error.headers if isinstance(error, ServiceError) else {}
    return _response(scope, status, kind, str(error), headers=headers)


def _response(
    scope: Scope,
    status: int,
    kind: str,
    message: str,
    details: Sequence[Any] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    path = scope["path"]
    if path == "/rerank":
        kind = _TEI_KINDS.get(kind, "Validation")
    body = body_of(path, status, kind, message, list(details))
    if path == "/v2/rerank":
        body = {"id": scope["state"]["request_id"], **body}
    return JSONResponse(body, status, headers)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PruneryError)
    return _answer_to(request.scope, error)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    scope = request.scope
    if error.status_code == 404:
        message, kind = f"there is nothing at {scope['path']:.200}.", "not_found"
    elif error.status_code == 405:
        message, kind = f"{scope['path']:.200} does not take {scope['method']:.20}.", "method"
    else:
        message, kind = f"{error.detail!s:.200}", "validation"
    return _response(scope, error.status_code, kind, message, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = [_detail(one) for one in error.errors()[:20]]
    said = [f"{'.'.join(one['loc'])}: {one['msg']}" for one in details[:3]]
    return _response(request.scope, 422, "validation", "; ".join(said), details)


def _detail(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loc": [f"{part!s:.100}" for part in one["loc"]],
        "msg": f"{one['msg']:.200}",
        "type": one["type"],
        "input": _shown(one.get("input")),
    }


def _shown(value: object) -> str:
    """At most 200 characters of what was found, without writing out all of a large one."""
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    return f"{value!s:.200}" if not isinstance(value, str) else value[:200]
