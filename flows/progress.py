"""Progress of a running step, published to Prefect as an artifact that others can follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from ..pipelines.progress import Progress, Silent

EVERY = 3.0  # seconds between updates; a shorter step publishes nothing
GOODBYE = 5.0  # seconds that a step waits at its end for the last update


class Published:
    """Percent of shards done, of the task run in whose context `publish` is called.

    `told` hears the same. What happens to Prefect's server never reaches the step.
    """

    def __init__(self, key: str, told: Progress) -> None:
        self._key = key
        self._told = told
        self._name = key
        self._done = self._total = 0
        self._ended = threading.Event()

    def start(self, name: str, total: int) -> None:
        """A step of `total` shards begins."""
        self._name, self._total = name, total
        self._told.start(name, total)

    def advance(self, n: int = 1) -> None:
        """`n` more shards are done."""
        self._done += n
        self._told.advance(n)

    def finish(self) -> None:
        """The step is committed."""
        self._done = self._total
        self._told.finish()

    @property
    def percent(self) -> float:
        """Of shards done, 0 to 100."""
        return 100.0 * min(1.0, self._done / self._total) if self._total else 0.0

    def publish(self) -> None:
        """Publish what changed, every `EVERY` seconds and once more at the end."""
        identity: Any = None
        said: float | None = None
        while True:
            ended = self._ended.wait(EVERY)
            now = self.percent
            if now != said and not (ended and identity is None):
                with suppress(Exception):  # who watches must not fail what is watched
                    if identity is None:
                        identity = create_progress_artifact(now, self._key, self._name)
                    else:
                        update_progress_artifact(identity, now)
                    said = now
            if ended:
                return

    def end(self) -> None:
        """Let `publish` say its last."""
        self._ended.set()


@contextmanager
def published(key: str, told: Progress | None) -> Iterator[Progress]:
    """Progress of the running task under an artifact's `key`; `told` hears of it as well."""
    progress = Published(key, told or Silent())
    # The copied context tells Prefect which task run the artifact is of.
    thread = threading.Thread(
        target=copy_context().run, args=(progress.publish,), name="progress", daemon=True
    )
    thread.start()
    try:
        yield progress
    finally:
        progress.end()
        thread.join(GOODBYE)
