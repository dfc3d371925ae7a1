"""A store in a bucket that speaks the S3 protocol, through s3fs (the extra `s3`).

Parts are immutable objects whose names carry their content; the one thing that must happen at
most once, creating a manifest or a journal entry, is a PUT with `If-None-Match: *`, which the
server refuses where the object exists (Amazon since 2024, MinIO, Ceph, R2 …). A server that
ignores the condition loses nothing: every manifest of a key lists immutable objects that exist.
"""

import errno
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, StoreError
from .backend import FileInfo
from .locks import FileLock

_CONFLICT_RETRIES = 5
_BLOCK = 8 << 20


class _Reading(io.RawIOBase):
    """An object that is read in blocks, each of which may fail as a request does."""

    def __init__(self, file: BinaryIO, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._file = file
        self._errors = errors

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class S3Backend:
    """A prefix in a bucket."""

    def __init__(self, rest: str, options: Mapping[str, Any]) -> None:
        root = rest.strip("/")
        if not root:
            raise InputError("expected s3://bucket/prefix, found no bucket")
        try:
            import s3fs
        except ImportError as error:
            raise StoreError(
                "expected s3fs for a store at s3://, found it not installed; "
                'run: pip install "prunery[s3]"'
            ) from error
        self.root = root
        self.uri = f"s3://{root}"
        self._bucket = root.partition("/")[0]
        self._bucket_seen = False
        # s3fs would otherwise answer from listings it saw before another process wrote
        self._fs = s3fs.S3FileSystem(**{"use_listings_cache": False, **options})

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Let "no such file" through; anything else that goes wrong is a StoreError."""
        from aiohttp import ClientError  # a body cut off in the middle; s3fs lets it through
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        try:
            yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._no_bucket() from error
            raise
        except (OSError, BotoCoreError, ClientError) as error:
            raise StoreError(
                f"{self.uri}/{path}: expected an answer from the object store, found: {error}; "
                "check the endpoint, the credentials and the permissions on the bucket"
            ) from error

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"expected the bucket {self._bucket!r} to exist, found none; create it, or give the "
            "right --store or endpoint"
        )

    def _check_bucket(self) -> None:
        """An empty listing may mean an empty store or a misspelt bucket; ask once which."""
        if not self._bucket_seen:
            with self._errors(""):
                self._fs.call_s3("list_objects_v2", Bucket=self._bucket, MaxKeys=1)
            self._bucket_seen = True

    def read(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(self._fs.cat_file(self._at(path)))

    def create(self, path: str, data: bytes) -> bool:
        for attempt in range(_CONFLICT_RETRIES):
            try:
                with self._errors(path):
                    return self._put_new(path, data)
            except _ConflictError:
                time.sleep(0.1 * 2**attempt)
        raise StoreError(
            f"{self.uri}/{path}: expected to create the object or find it there, found another "
            f"writer in the way {_CONFLICT_RETRIES} times; run again"
        )

    def _put_new(self, path: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            pass
        except OSError as error:
            code = _code(error)
            if code == "ConditionalRequestConflict":
                raise _ConflictError from error
            if code != "PreconditionFailed":
                raise
        else:
            return True
        # s3fs repeats a PUT whose answer was lost; then the object that exists is ours
        return self.read(path) == data

    def replace(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._fs.pipe_file(self._at(path), data)

    def place(self, local: Path, path: str) -> None:
        size = local.stat().st_size
        with self._errors(path):
            self._fs.put_file(str(local), self._at(path))
            stored = self.stat(path)
        if stored is None or stored.size != size:
            found = "no such object" if stored is None else str(stored.size)
            raise StoreError(
                f"{self.uri}/{path}: expected {size} bytes after the upload, found {found}; "
                "run again"
            )
        local.unlink()

    def stat(self, path: str) -> FileInfo | None:
        with self._errors(path):
            try:
                info = self._fs.info(self._at(path))
            except FileNotFoundError:
                return None
        return self._info(path, info) if info["type"] == "file" else None

    def _info(self, path: str, info: Mapping[str, Any]) -> FileInfo:
        modified = info.get("LastModified")
        seconds = modified.timestamp() if modified is not None else time.time()
        return FileInfo(path, int(info["size"]), seconds)

    def walk(self, prefix: str) -> Iterator[FileInfo]:
        with self._errors(prefix):
            found = self._fs.find(self._at(prefix), detail=True)
        if not found:
            self._check_bucket()
        for full, info in sorted(found.items()):
            yield self._info(full.removeprefix(f"{self.root}/"), info)

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            try:
                found = self._fs.ls(self._at(prefix), detail=True, refresh=True)
            except FileNotFoundError:
                found = []
        if not found:
            self._check_bucket()
        return sorted(
            info["name"].rstrip("/").rpartition("/")[2]
            for info in found
            if info["type"] == "directory"
        )

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._errors(path):
            starts = [start for start, _ in ranges]
            ends = [start + length for start, length in ranges]
            # requested side by side
            pieces = self._fs.cat_ranges(
                [self._at(path)] * len(ranges), starts, ends, on_error="raise"
            )
            return [bytes(piece) for piece in pieces]

    def open(self, path: str) -> BinaryIO:
        with self._errors(path):
            file: BinaryIO = self._fs.open(self._at(path), "rb", block_size=_BLOCK)
        return io.BufferedReader(_Reading(file, lambda: self._errors(path)), _BLOCK)

    def remove(self, path: str) -> None:
        with self._errors(path):
            self._fs.rm_file(self._at(path))

    def remove_tree(self, prefix: str) -> None:
        with self._errors(prefix):
            found = self._fs.find(self._at(prefix))
            if found:
                self._fs.rm(found)

    def scratch(self, path: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="prunery-"))

    def local(self, path: str) -> Path | None:
        return None

    def lock(self, path: str) -> FileLock | None:
        return None

    def now(self) -> float:
        """The server's clock: ours may be ahead, and make the work of others look old."""
        with self._errors(""):
            answer = self._fs.call_s3("list_objects_v2", Bucket=self._bucket, MaxKeys=1)
        said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            return parsedate_to_datetime(said).timestamp()
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{self.uri}: expected the server to tell its time in the header Date, found"
                f" {said!r:.80}; without it nothing can be said to be old"
            ) from error


class _ConflictError(Exception):
    """Two conditional requests for one object met; one of them has to be repeated."""


def _code(error: OSError) -> str:
    """The S3 error code behind an OSError of s3fs, empty where there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    if not code and error.errno == errno.EEXIST:
        return "PreconditionFailed"
    return code
