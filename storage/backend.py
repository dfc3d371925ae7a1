"""Where a store's files are: a folder. The object store's side is in `s3.py`.

Paths are relative to the root, with `/`. Files are immutable once they stand, names apart.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import InputError, StoreError
from .locks import FileLock


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One stored file: path relative to the root, bytes, time of change in seconds since 1970."""

    path: str
    size: int
    modified: float


class Backend(Protocol):
    """What the store asks of the place where its files are."""

    uri: str

    def read(self, path: str) -> bytes:
        """Return a small file whole. Raises FileNotFoundError."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False if another got there first. Atomic."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a file or put it in place of the old one. Atomic."""

    def place(self, local: Path, path: str) -> None:
        """Move a finished local file in; it is durable when this returns."""

    def stat(self, path: str) -> FileInfo | None:
        """Return what is known of a file, None where there is none."""

    def walk(self, prefix: str) -> Iterator[FileInfo]:
        """Give every file under a folder."""

    def folders(self, prefix: str) -> list[str]:
        """Give the names of the folders directly under a folder."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each (start, length); fewer where the file ends before."""

    def open(self, path: str) -> BinaryIO:
        """Open for reading from the start to the end. Raises FileNotFoundError."""

    def remove(self, path: str) -> None:
        """Delete a file if it is there."""

    def remove_tree(self, prefix: str) -> None:
        """Delete a folder and all in it."""

    def scratch(self, path: str) -> Path:
        """Make a fresh local folder for unfinished files, `path` where files are local."""

    def local(self, path: str) -> Path | None:
        """Return the path on this machine, None where files are elsewhere."""

    def lock(self, path: str) -> FileLock | None:
        """Return a lock of that name, None where there are none."""

    def now(self) -> float:
        """Seconds since 1970 by the clock that `FileInfo.modified` is read from."""


def connect(uri: str, options: Mapping[str, Any]) -> Backend:
    """Open the backend of a URI: a path, `file://…`, or `s3://bucket/prefix`.

    Raises:
        InputError: another scheme.
        StoreError: the extra for the scheme is not installed.
    """
    scheme, _, rest = uri.partition("://")
    if not rest and "://" not in uri:
        return LocalBackend(Path(uri))
    if scheme in ("file", "local"):
        return LocalBackend(Path(rest))
    if scheme in ("s3", "s3a"):
        from .s3 import S3Backend

        return S3Backend(rest, options)
    raise InputError(
        f"expected a store at a path, file:// or s3://bucket/prefix, found {uri!r}; "
        "other object stores are reached through their S3 endpoint "
        "(storage_options={'endpoint_url': …})"
    )


class LocalBackend:
    """A folder on a POSIX file system with hard links and flock."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))
        self.uri = str(self.root)

    def _at(self, path: str) -> Path:
        return self.root / path

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def create(self, path: str, data: bytes) -> bool:
        target = self._at(path)
        with self._written(target, data) as temporary:
            try:
                os.link(temporary, target)  # atomic, and fails where the name is taken
            except FileExistsError:
                return False
        _sync_folder(target.parent)
        return True

    def replace(self, path: str, data: bytes) -> None:
        target = self._at(path)
        with self._written(target, data) as temporary:
            os.replace(temporary, target)
        _sync_folder(target.parent)

    @contextmanager
    def _written(self, target: Path, data: bytes) -> Iterator[Path]:
        """A durable file with this content beside the target, gone afterwards."""
        _make_folder(target.parent)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def place(self, local: Path, path: str) -> None:
        target = self._at(path)
        _make_folder(target.parent)
        with open(local, "rb") as file:
            os.fsync(file.fileno())
        os.replace(local, target)
        _sync_folder(target.parent)

    def stat(self, path: str) -> FileInfo | None:
        try:
            found = self._at(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileInfo(path, found.st_size, found.st_mtime)

    def walk(self, prefix: str) -> Iterator[FileInfo]:
        for folder, _, files in os.walk(self._at(prefix)):
            for name in sorted(files):
                path = Path(folder, name).relative_to(self.root).as_posix()
                info = self.stat(path)
                if info is not None:  # else deleted while we looked
                    yield info

    def folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._at(prefix)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._at(path).open("rb") as file:
            return [_pread(file.fileno(), start, length) for start, length in ranges]

    def open(self, path: str) -> BinaryIO:
        return self._at(path).open("rb")

    def remove(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def remove_tree(self, prefix: str) -> None:
        target = self._at(prefix)
        if target.exists():
            shutil.rmtree(target)

    def scratch(self, path: str) -> Path:
        folder = self._at(path)
        folder.mkdir(parents=True)
        return folder

    def local(self, path: str) -> Path | None:
        return self._at(path)

    def lock(self, path: str) -> FileLock | None:
        return FileLock(self._at(path))

    def now(self) -> float:
        return time.time()


def _pread(fd: int, start: int, length: int) -> bytes:
    pieces = []
    while length and (piece := os.pread(fd, length, start)):  # at most 2 GiB at once
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _make_folder(folder: Path) -> None:
    """Create a folder and make its name, and its parents' names, durable."""
    if folder.is_dir():
        return
    try:
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(
            f"expected a folder at {folder}, found a file; give the store another place"
        ) from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
