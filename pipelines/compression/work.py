"""Where the unfinished work of a compression step lies, held by one process at a time.

The folder lies under the cache (`PRUNERY_CACHE`, else `~/.cache/prunery`), named by the key of
the table in the making and by the part of it. Two processes that make the same table would write
over each other there, so each holds a lock beside the folder: the second waits, says so, and then
finds the layers of the first done. The lock of a process that dies is free.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

from ...errors import PruneryWarning, StoreError
from ...storage import TableWriter
from ...storage.locks import FileLock
from ..engine import Job

Finish = Callable[[Job, TableWriter], None]


def work_folder(key: str, part: int = 0) -> Path:
    """Where unfinished layers of a table lie."""
    home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
    return Path(home, "compression", f"{key[:32]}-{part}")


@contextmanager
def working(key: str, part: int = 0) -> Iterator[Path]:
    """The folder of a part, which may not be there yet, held alone inside the block.

    Waits for the process that holds it, with a PruneryWarning.
    """
    folder = work_folder(key, part)
    lock = _lock(folder)
    if not lock.try_exclusive():
        warnings.warn(
            f"{folder}: another process is at work on the same table; waiting for it to end. Stop"
            " one of the two if they were not meant to run together.",
            PruneryWarning,
            stacklevel=3,
        )
        lock.exclusive()
    try:
        yield folder
    finally:
        lock.release(unlink=True)


def alone(finish: Finish) -> Finish:
    """A step's `finish` that holds its table's work folder while it runs."""

    @wraps(finish)
    def held(job: Job, writer: TableWriter) -> None:
        with working(job.key):
            finish(job, writer)

    return held


@contextmanager
def unfinished_model(work: Path) -> Iterator[Path]:
    """An empty folder under `work` to write a model's files in; gone when the block ends.

    It lies beside the layers for the room on that disk, and so as not to outlive them.

    Raises StoreError where a file cannot be written.
    """
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=work))
    try:
        yield folder
    except OSError as error:
        raise StoreError(
            f"{folder}: expected to write the compressed model there, found: {error}. Free some"
            " space, or set PRUNERY_CACHE to a folder on a disk with more, and run again. The"
            " source model is as it was."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            work.rmdir()  # where nothing else lies there


def remove_work(key: str) -> None:
    """Remove the folders of all parts of a table that is committed.

    One that another process holds stays: that process removes it when it ends.
    """
    first = work_folder(key)
    parts: dict[str, list[Path]] = {}
    for folder in sorted(first.parent.glob(f"{key[:32]}-*")):
        if folder.is_dir():
            parts.setdefault(folder.name.split("-")[1], []).append(folder)
    for part, folders in parts.items():
        lock = _lock(work_folder(key, int(part)))
        if lock.try_exclusive():
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            lock.release(unlink=True)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))
