"""`prunery serve`: one process that listens, answers, and ends in good order."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from ..errors import InputError, PruneryError
from .app import create_app
from .protocol import BoundedProtocol
from .served import Loading
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from ..pruners.context import ContextPruner

ENDING_SECONDS = 2.0
"""For connections to close after the last answer."""


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM goes on answering /readyz while requests end."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,  # ours says how long an answer took
            server_header=False,
            proxy_headers=False,
            ws="none",
            http=BoundedProtocol,
            timeout_graceful_shutdown=max(1, round(ENDING_SECONDS)),
        )
        super().__init__(config)
        self._service: Service = app.state.service
        self._state = app.state
        self._seconds = settings.drain_seconds
        self._drain_ends: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second SIGINT ends at once."""
        if self._drain_ends is not None and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
            return
        if self._drain_ends is None:
            self._drain_ends = time.monotonic() + self._seconds
            self._service.state = "draining"

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self.error is not None:
            self.should_exit = True
        if self._drain_ends is not None:
            over = time.monotonic() > self._drain_ends
            if over:
                for served in self._service.models.values():
                    served.batcher.close(join_seconds=0.0)
            if over or not self._service.metrics.in_flight:
                self.should_exit = True
        return await super().on_tick(counter)

    @property
    def error(self) -> PruneryError | None:
        """Why the models did not load."""
        loading: Loading | None = self._state.loading
        return None if loading is None else loading.error


def serve(
    settings: Settings,
    *,
    ready: Callable[[str], None] = lambda _: None,
    pruners: Mapping[str, ContextPruner] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, and return once all requests have ended.

    Parameters
    ----------
    ready
        Called with the address once the socket listens (models may still be loading).
    pruners
        As in `create_app`.

    Raises
    ------
    PruneryError
        A model does not load, or the address cannot be listened on.
    """
    _log()
    app = create_app(settings, pruners=pruners)
    server = Server(app, settings)
    sock = _listen(settings.host, settings.port)
    host, port = sock.getsockname()[:2]
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    gc.freeze()  # what is loaded by now stays; collections need not look at it
    server.run(sockets=[sock])
    if server.error is not None:
        raise server.error


def _log() -> None:
    """One line a request and a warning where one is due, to standard error; nothing of others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("prunery", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}."
            " Give another --host or --port (0 takes a free one)."
        ) from error
    return sock
