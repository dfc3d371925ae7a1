"""Parquet parts: written with their digest, read only as the manifest says they are."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, StoreError
from . import schemas
from .backend import Backend
from .manifest import Part
from .rowhash import RowHash

ZSTD_LEVEL = 3


class _HashingFile(io.RawIOBase):
    """A file opened for writing that hashes what passes through."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "xb")  # noqa: SIM115 closed in close()
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._file.write(view)
        self.sha256.update(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
        super().close()

    def fileno(self) -> int:
        return self._file.fileno()


class PartWriter:
    """Writes one Parquet file of a fixed schema, row groups of bounded size, hashing on the way.

    Rows wait in memory until a row group is full (`ROW_GROUP_BYTES` or the schema's row
    limit), so that many small batches do not become many small row groups.
    """

    def __init__(self, path: Path, schema: pa.Schema, metadata: dict[str, str]) -> None:
        self.path = path
        self.schema = schema
        self.rowhash = RowHash()
        self._settings = schemas.ParquetSettings.of(schema)
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._file = _HashingFile(path)
        self._writer = pq.ParquetWriter(
            self._file,
            schemas.with_metadata(schema, metadata),
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=self._settings.dictionary,
            use_byte_stream_split=self._settings.byte_stream_split,
            write_page_checksum=True,
            write_page_index=True,
        )

    def write(self, table: pa.Table) -> None:
        """Append rows that already have the schema."""
        for batch in table.to_batches():
            self.rowhash.update(batch)
        limit = self._settings.row_group_rows
        while table.num_rows:
            room = limit - self._pending_rows
            head, table = table.slice(0, room), table.slice(room)
            self._pending.append(head)
            self._pending_rows += head.num_rows
            self._pending_bytes += head.nbytes
            if self._pending_rows >= limit or self._pending_bytes >= schemas.ROW_GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        if not self._pending_rows:
            return
        group = pa.concat_tables(self._pending)
        rows = group.num_rows
        if group.nbytes > 2 * schemas.ROW_GROUP_BYTES:  # one batch of very wide rows
            rows = max(1, rows * schemas.ROW_GROUP_BYTES // group.nbytes)
        self._writer.write_table(group, row_group_size=rows)
        self._pending.clear()
        self._pending_rows = self._pending_bytes = 0

    def close(self) -> None:
        """Write what is left and the footer; the file is durable when this returns."""
        self._flush()
        self._writer.close()
        self._file.close()

    def abort(self) -> None:
        """Give up and remove the file."""
        self._pending.clear()
        try:
            self._writer.close()
            self._file.close()
        except (OSError, pa.ArrowException):
            # the disk may be full: what matters is that the name goes away
            self._file._file.close()
        self.path.unlink(missing_ok=True)

    def part(self, path: str, shard: int) -> Part:
        """Describe the closed file for the manifest."""
        return Part(
            path=path,
            rows=self.rowhash.rows,
            bytes=self._file.bytes,
            sha256=self._file.sha256.hexdigest(),
            logical_digest=self.rowhash.text,
            shard=shard,
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes written so far."""
        return self._file.sha256.hexdigest()


class PartReader:
    """Reads one listed Parquet file, batch by batch, and refuses one that is not as listed.

    Checked on every read: the file's length, its row count, and the checksum of every page.
    (The SHA-256 of the whole is what `Store.verify` checks.)
    """

    def __init__(self, backend: Backend, folder: str, part: Part) -> None:
        self._backend = backend
        self._path = f"{folder}/{part['path']}"
        self._part = part
        self._source: pa.NativeFile | None = None
        self._file: pq.ParquetFile | None = None

    def __enter__(self) -> "PartReader":
        info = self._backend.stat(self._path)
        if info is None:
            raise StoreError(
                f"{self._path}: expected a part of {self._part['rows']} rows as the manifest "
                "lists it, found no such file; remove the table and run its step again"
            )
        if info.size != self._part["bytes"]:
            raise StoreError(
                f"{self._path}: expected {self._part['bytes']} bytes as the manifest lists, "
                f"found {info.size}; the file is truncated or was changed: "
                "remove the table and run its step again"
            )
        with self.errors():
            self._source = self._backend.open(self._path)
            self._file = self._open()
        if self._file.metadata.num_rows != self._part["rows"]:
            raise StoreError(
                f"{self._path}: expected {self._part['rows']} rows as the manifest lists, "
                f"found {self._file.metadata.num_rows}; remove the table and run its step again"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._source is not None:
            self._source.close()

    def _open(self, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._source,
            metadata=metadata,
            pre_buffer=True,
            page_checksum_verification=True,
        )

    @property
    def row_group_rows(self) -> list[int]:
        """Rows of each row group."""
        meta = self._opened().metadata
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]

    def batches(
        self,
        columns: Sequence[str] | None = None,
        batch_rows: int | None = None,
        row_groups: Sequence[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Give the rows in order, holding one row group at a time."""
        meta = self._opened().metadata
        wanted = range(meta.num_row_groups) if row_groups is None else row_groups
        for group in wanted:
            with self.errors():
                # a new reader each time: one reader keeps the buffers of all groups it read
                stream = self._open(meta).iter_batches(
                    batch_size=batch_rows or schemas.WIDE_ROW_GROUP_ROWS,
                    row_groups=[group],
                    columns=None if columns is None else list(columns),
                )
            while True:
                with self.errors():
                    batch = next(stream, None)
                if batch is None:
                    break
                yield batch if columns is None else batch.select(list(columns))

    def _opened(self) -> pq.ParquetFile:
        if self._file is None:
            raise StoreError(f"{self._path}: the part is not open")
        return self._file

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what Arrow says about damaged files into a StoreError with the path."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"{self._path}: expected a readable Parquet part, found: {error}; "
                "check the table with `prunery verify`, remove it and run its step again"
            ) from error


def check_columns(schema: pa.Schema, columns: Sequence[str] | None, what: str) -> list[str] | None:
    """Return the columns as a list.

    Raises:
        InputError: a column that the schema does not have, with the ones it has.
    """
    if columns is None:
        return None
    if isinstance(columns, str):
        raise InputError(f"expected a list of columns, found the string {columns!r}")
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        raise InputError(f"{what}: expected columns among {schema.names}, found {unknown}")
    return list(columns)
