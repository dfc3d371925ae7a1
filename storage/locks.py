"""Locks between processes of one machine, released by the kernel when a process dies.

They say who is alive; what is committed is decided by exclusive creation, never by a lock.
On an object store there are none, and age takes their place.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileLock:
    """An advisory lock (flock) on a file of its own, held shared or exclusively.

    Each instance has its own file description, so two instances in one process exclude each
    other as two processes do. The file may be unlinked by whoever holds it exclusively.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def shared(self) -> None:
        """Wait for the lock and hold it shared."""
        self._acquire(fcntl.LOCK_SH)

    def exclusive(self) -> None:
        """Wait for the lock and hold it alone."""
        self._acquire(fcntl.LOCK_EX)

    def try_exclusive(self) -> bool:
        """Hold the lock alone if nobody else holds it; may be asked while holding it shared.

        On False a lock held shared is still held.
        """
        if self._fd is not None:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # converting drops the old lock first, so take it again
                fcntl.flock(self._fd, fcntl.LOCK_SH)
                return False
            return True
        try:
            self._acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self, *, unlink: bool = False) -> None:
        """Let go; with `unlink` (held exclusively) remove the file first."""
        if self._fd is None:
            return
        if unlink:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None

    def _acquire(self, how: int) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, how)
            return
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, how)
                if _is_file(fd, self.path):
                    self._fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # unlinked while we waited: lock the new file


def _is_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def held(lock: FileLock | None, *, exclusive: bool = False) -> Iterator[None]:
    """Hold a lock for a block; without a lock (object store) do nothing."""
    if lock is None:
        yield
        return
    if exclusive:
        lock.exclusive()
    else:
        lock.shared()
    try:
        yield
    finally:
        lock.release()
