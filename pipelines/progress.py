"""What a pipeline tells the person who waits for it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears about one step at a time; the command line draws bars with it."""

    def start(self, name: str, total: int) -> None:
        """A step of `total` shards begins (0 where its table exists already)."""

    def advance(self, n: int = 1) -> None:
        """`n` more shards are done."""

    def finish(self) -> None:
        """The step that was started last is committed."""


class Silent:
    """Says nothing."""

    def start(self, name: str, total: int) -> None:
        """Ignore the start of a step."""

    def advance(self, n: int = 1) -> None:
        """Ignore finished shards."""

    def finish(self) -> None:
        """Ignore the end of a step."""
