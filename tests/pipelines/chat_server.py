"""A local server that speaks the OpenAI protocol, well or badly, as a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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


def classic(
    top: Mapping[str, float] | None, usage: tuple[int, int] | None = (7, 1), **more: Any
) -> Said:
    """A completion with log probabilities in the shape of classic completions."""
    chosen = max(top, key=top.__getitem__) if top else ""
    logprobs = top and {
        "tokens": [chosen],
        "token_logprobs": [top[chosen]],
        "top_logprobs": [dict(top)],
        "text_offset": [0],
    }
    return _completion({"text": chosen, "logprobs": logprobs}, usage, more)


def content(
    top: Mapping[str, float],
    usage: tuple[int, int] | None = (7, 1),
    spelt: bool = True,
    **more: Any,
) -> Said:
    """A completion with log probabilities in the shape of chats; `spelt` gives tokens' bytes."""
    entries = [
        {"token": token, "logprob": value, "bytes": list(token.encode()) if spelt else None}
        for token, value in sorted(top.items(), key=lambda item: -item[1])
    ]
    first = {**entries[0], "top_logprobs": entries}
    message = {"role": "assistant", "content": entries[0]["token"]}
    return _completion({"message": message, "logprobs": {"content": [first]}}, usage, more)


def _completion(
    choice: dict[str, Any], usage: tuple[int, int] | None, more: dict[str, Any]
) -> Said:
    made: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": "length", **choice}]}
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
        if "prompt" in self.body:
            return self.body["prompt"]
        return self.body["messages"][-1]["content"]


class ChatServer:
    """Answers each request with `answer(asked, how many times this prompt was asked before)`."""

    def __init__(self, answer: Callable[[Asked, int], Said], keep_alive: bool = False) -> None:
        self.answer = answer
        self.connections = 0
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                with outer._lock:
                    outer.connections += 1

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
            handler.close_connection = True
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
def serving(answer: Callable[[Asked, int], Said], keep_alive: bool = False) -> Iterator[ChatServer]:
    """Run a server in a thread for the length of a `with`."""
    server = ChatServer(answer, keep_alive)
    thread = threading.Thread(target=server._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
        thread.join()
