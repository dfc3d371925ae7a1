"""A local server that speaks the chat-completions protocol, well or badly, as a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One answer of the server: a status, a body, headers, and how slowly it comes."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0  # seconds between single bytes
    hang_up: bool = False


def reply(
    text: str | None, finish: str = "stop", usage: tuple[int, int] | None = (100, 10), **more: Any
) -> Said:
    """A well-formed chat completion."""
    made: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        ],
    }
    if usage:
        made["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return Said(json.dumps(made).encode(), **more)


@dataclass
class Asked:
    """One request that came in."""

    at: float
    path: str
    key: str | None
    body: dict[str, Any]

    @property
    def user(self) -> str:
        return self.body["messages"][-1]["content"]


class ChatServer:
    """Answers each request with `answer(asked, how many times this prompt was asked before)`."""

    def __init__(self, answer: Callable[[Asked, int], Said]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        asked = Asked(
            time.monotonic(), handler.path, handler.headers.get("Authorization"), json.loads(raw)
        )
        with self._lock:
            self.asked.append(asked)
            before = self._seen.get(asked.user, 0)
            self._seen[asked.user] = before + 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._say(handler, self.answer(asked, before))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up on us, as some tests want
        finally:
            with self._lock:
                self._now -= 1

    def _say(self, handler: BaseHTTPRequestHandler, said: Said) -> None:
        time.sleep(said.delay)
        if said.hang_up:
            handler.connection.close()
            return
        handler.send_response(said.status)
        for name, value in said.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(said.body)))
        handler.end_headers()
        if not said.drip:
            handler.wfile.write(said.body)
            return
        for byte in said.body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(said.drip)


@contextmanager
def serving(answer: Callable[[Asked, int], Said]) -> Iterator[ChatServer]:
    """Run a server in a thread for the length of a `with`."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
        thread.join()
