"""uvicorn's HTTP protocol with an end to heads, trailers and waiting.

A connection that sends no whole head, or one without end, is closed; uvicorn's own protocol over
httptools waits for it, and keeps what it sends, for as long as the client likes.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
"""Request line and header fields, trailers included; then 431."""
HEAD_FIELDS = 200
"""Header fields, trailers included; then 431."""
HEAD_SECONDS = 10.0
"""From a connection or the first byte of a request to the end of its head; then 408."""

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head = True
    _refused = False
    _began = False
    _excess = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock of the first head starts."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """No clock is left behind."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; what is not body may not be long: an unfinished field is kept by the parser."""
        if self._refused:
            return
        self._began = False
        super().data_received(data)
        if not self._began and not self._refused:  # else the data may be of the request before
            self._excess += len(data)
            if self._excess > HEAD_BYTES:
                self._refuse(431)

    def on_message_begin(self) -> None:
        """A request begins, perhaps on a connection that served some already."""
        super().on_message_begin()
        self._in_head, self._began, self._excess = True, True, 0
        if self._timer is None:
            self._start_clock()

    def on_body(self, body: bytes) -> None:
        """Each byte of a body may have the framing of a chunk of its own."""
        self._excess -= 8 * len(body)
        super().on_body(body)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse by an exception, which ends the parsing of what came with this field."""
        super().on_header(name, value)
        if len(self.headers) > HEAD_FIELDS or len(name) + len(value) > HEAD_BYTES:
            self._refuse(431)
            raise ValueError("too many or too long header fields")

    def on_headers_complete(self) -> None:
        """The request is started unless its head is too long."""
        self._in_head = False
        self._stop_clock()
        if self._refused:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_BYTES:
            self._refuse(431)
            raise ValueError("the head is too long")
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what cannot be parsed, unless ours was given."""
        if not self._refused:
            super().send_400_response(msg)

    def _start_clock(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _late(self) -> None:
        if self._running:  # nothing more is read before the answer to the request before
            self._start_clock()
        else:
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        self._refused = True
        self._stop_clock()
        if not self._running and not self.transport.is_closing():
            head = f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            self.transport.write(f"{head}connection: close\r\ncontent-length: 0\r\n\r\n".encode())
        self.transport.close()
