"""Between a store and an S3 server: fails, stalls, cuts off and answers with what was."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>m</Message>'
    "<RequestId>r</RequestId></Error>"
)
HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server", "content-length"}


@dataclass(frozen=True)
class Asked:
    """One request: how many came before it, method, path with query, and whether it writes."""

    number: int
    method: str
    path: str

    @property
    def listing(self) -> bool:
        return "list-type=2" in self.path


@dataclass(frozen=True)
class Fails:
    """An answer in place of the server's, which never hears of the request."""

    status: int
    code: str


@dataclass(frozen=True)
class Stalls:
    """No answer for so many seconds, then a closed connection."""

    seconds: float


@dataclass(frozen=True)
class Cut:
    """The server does it; of its answer the client gets the head and half the body, or nothing."""

    nothing: bool = False


@dataclass(frozen=True)
class Stale:
    """The first answer ever given to this request; "not there" where none was."""


Rule = Callable[[Asked], Fails | Stalls | Cut | Stale | None]


@dataclass
class Proxy:
    """`rule` decides what happens to each request; `asked` are those that came."""

    url: str = ""
    rule: Rule = lambda asked: None
    asked: list[Asked] = field(default_factory=list)
    first: dict[str, tuple[int, list[tuple[str, str]], bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fails_from(self, number: int, what: Any, count: int = 10**9) -> None:
        """From now on, the requests number `number` to `number + count` fail."""
        with self.lock:
            start = len(self.asked) + number
        self.rule = lambda asked: what if start <= asked.number < start + count else None


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of a server."""
    made = Proxy()
    address = upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do(self) -> None:
            with made.lock:
                asked = Asked(len(made.asked), self.command, self.path)
                made.asked.append(asked)
            body = self._body()
            what = made.rule(asked)
            if isinstance(what, Stalls):
                time.sleep(what.seconds)
                self.close_connection = True
                return
            if isinstance(what, Fails):
                self._answer(what.status, [], ERROR.format(what.code).encode())
                return
            key = f"{self.command} {self.path} {self.headers.get('range')}"
            if isinstance(what, Stale):
                missing = (
                    404,
                    [],
                    b"" if self.command == "HEAD" else ERROR.format("NoSuchKey").encode(),
                )
                self._answer(*made.first.get(key, missing))
                return
            answer = self._ask(address, body)
            if self.command in ("GET", "HEAD"):
                made.first.setdefault(key, answer)
            if isinstance(what, Cut):
                self.close_connection = True
                if not what.nothing:
                    self._answer(*answer, half=True)
                return
            self._answer(*answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            return b"".join(parts)

        def _ask(self, address: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(address, timeout=60)
            headers = {
                n: v
                for n, v in self.headers.items()
                if n.lower() not in ("connection", "expect", "transfer-encoding", "content-length")
            }
            connection.request(
                self.command,
                self.path,
                body=body,
                headers={**headers, "Content-Length": str(len(body))},
            )
            found = connection.getresponse()
            kept = [
                (n, v) for n, v in found.getheaders() if n.lower() not in HOP - {"content-length"}
            ]
            if self.command != "HEAD":
                kept = [(n, v) for n, v in kept if n.lower() != "content-length"]
            data = found.read()
            connection.close()
            return found.status, kept, data

        def _answer(
            self, status: int, headers: list[tuple[str, str]], body: bytes, half: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if half else body)
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
