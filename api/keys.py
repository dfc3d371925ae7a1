"""API keys: a file of them, read again when it changes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from ..errors import InputError

SHORTEST = 16
"""Characters of a key; a shorter one could be guessed."""

logger = logging.getLogger(__name__)


class ApiKeys:
    """Keys of one file: one a line, blank lines and lines that start with # left out.

    Keys are added, changed and withdrawn by writing the file (best by renaming a new one over
    it); the next request sees it. A file that has become unreadable or holds a bad key accepts
    nobody until it is mended, so that a withdrawn key never comes back by accident.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file cannot be read or holds no proper keys."""
        self._path = path
        self._seen = self._stamp()
        self._digests = read_digests(path)

    def accepts(self, given: str) -> bool:
        """Whether `given` is one of the keys; the time taken tells nothing about them."""
        self._refresh()
        digest = _digest(given)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._digests = read_digests(self._path)
            logger.info("read %d API keys from %s", len(self._digests), self._path)
        except InputError as error:
            self._digests = ()
            logger.error("no request is let in until the keys are mended: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def read_digests(path: Path) -> tuple[bytes, ...]:
    """SHA-256 of each key of a file.

    Raises
    ------
    InputError
        The file cannot be read, has no key, or one that is too short or not printable ASCII. The
        message holds the line's number, never the key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the API keys at {path} cannot be read: {error}.") from error
    digests = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"{path}, line {number}: an API key is at least {SHORTEST} printable ASCII"
                " characters without spaces. Make one with: openssl rand -hex 24"
            )
        digests.append(_digest(key))
    if not digests:
        raise InputError(f"{path} holds no API key; put one a line (openssl rand -hex 24).")
    return tuple(digests)


def _digest(key: str) -> bytes:
    # Equal lengths for compare_digest, and no key stays in memory.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
