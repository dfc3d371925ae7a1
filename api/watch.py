"""Around every request: counted, timed, logged, and cancelled when its client goes away.

Pure ASGI: servers do not cancel a handler when its client disconnects, they only say so to whoever
listens. Here somebody listens, from the moment that the body is read.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Service

logger = logging.getLogger("prunery.access")

CLIENT_GONE = 499
"""In logs and metrics, a request whose client did not wait."""


class Watch:
    """Middleware: metrics and one log line a request, and its end when the client has gone."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._app, self._service, scope, receive, send).serve()


class _Exchange:
    def __init__(
        self, app: ASGIApp, service: Service, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._app, self._service, self._scope = app, service, scope
        self._receive, self._send = receive, send
        self._status = 500
        self._counted = False
        self._gone = False
        self._over = False
        self._watcher: asyncio.Task[Message] | None = None
        self._task = asyncio.current_task()

    async def serve(self) -> None:
        began = time.perf_counter()
        self._count(1)
        try:
            await self._app(self._scope, self._next, self._answer)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            if self._task is not None:
                self._task.uncancel()
            self._status = CLIENT_GONE
            self._service.metrics.cancelled.inc()
        finally:
            self._over = True
            if self._watcher is not None:
                self._watcher.cancel()
            self._count(-1)
            self._note(time.perf_counter() - began)

    def _count(self, by: int) -> None:
        """A request counts as running until its end, a stream of events until it begins."""
        if (by > 0) == self._counted:
            return
        self._counted = by > 0
        self._service.metrics.count(by)

    def _note(self, seconds: float) -> None:
        route = getattr(self._scope.get("route"), "path", "unknown")
        metrics = self._service.metrics
        metrics.requests.labels(route, str(self._status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        if logger.isEnabledFor(logging.INFO):
            client = (self._scope.get("client") or ("-",))[0]
            method = self._scope["method"]
            path = self._scope["path"].encode("unicode_escape").decode("ascii")
            logger.info("%s %s %.200s %s %.4f s", client, method, path, self._status, seconds)

    async def _next(self) -> Message:
        """The next message of the body; once it is whole, what the watcher hears."""
        if self._watcher is not None:
            return await asyncio.shield(self._watcher)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._watcher = asyncio.ensure_future(self._receive())
            self._watcher.add_done_callback(self._heard)
        return message

    def _heard(self, watcher: asyncio.Task[Message]) -> None:
        if self._over or watcher.cancelled() or watcher.exception() is not None:
            return
        if watcher.result()["type"] == "http.disconnect" and self._task is not None:
            self._gone = True
            self._task.cancel()

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message.get("headers", ()))
            if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                self._count(-1)
            if self._status == 503 and b"retry-after" not in headers:
                said = [*message.get("headers", ()), (b"retry-after", b"1")]
                message = {**message, "headers": said}
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._over = True  # the server now reports the end as a disconnect
        await self._send(message)
