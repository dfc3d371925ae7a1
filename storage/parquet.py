"""Parquet parts: written with their digest, read only as the manifest says they are."""

import base64
import bisect
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InputError, StoreError
from . import schemas
from .backend import Backend
from .manifest import Part
from .rowhash import RowHash

ZSTD_LEVEL = 3

_MAGIC = b"PAR1"
_ADVICE = "check the table with `prunery verify`, remove it and run its step again"


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
            self._file.close()
        super().close()


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
        """Write what is left and the footer. (`Backend.place` makes the file durable.)"""
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
        """Describe the closed file for the manifest; it must still be where it was written."""
        checksums = Checksums.of(self.path)
        return Part(
            path=path,
            rows=self.rowhash.rows,
            bytes=self._file.bytes,
            sha256=self._file.sha256.hexdigest(),
            logical_digest=self.rowhash.text,
            shard=shard,
            footer=checksums.footer,
            checksums=checksums.text,
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes written so far."""
        return self._file.sha256.hexdigest()


@dataclass(frozen=True, slots=True)
class Checksums:
    """CRC-32 of everything in a Parquet file that a reader interprets.

    Parquet's own page checksums leave out page headers and the footer, where one flipped bit
    can change values unnoticed. So a part lists one checksum for the footer (from the end of
    the last column chunk to the end of the file) and one for every column chunk, row group by
    row group. A reader checks what it reads and nothing else.
    """

    footer: int
    values: NDArray[np.uint32]  # footer first, then (row group, leaf column)

    @classmethod
    def of(cls, path: Path) -> "Checksums":
        """Compute them for a finished file."""
        meta = pq.read_metadata(path)
        spans = [
            span for g in range(meta.num_row_groups) for span in _chunk_spans(meta.row_group(g))
        ]
        end = max((start + length for start, length in spans), default=len(_MAGIC))
        with open(path, "rb") as file:
            crcs = []
            for start, length in [(end, path.stat().st_size - end), *spans]:
                file.seek(start)
                crcs.append(zlib.crc32(file.read(length)))
        return cls(end, np.array(crcs, np.uint32))

    @property
    def text(self) -> str:
        """The values as little-endian numbers in base64."""
        return base64.b64encode(self.values.astype("<u4").tobytes()).decode("ascii")

    @classmethod
    def parse(cls, part: Part) -> "Checksums":
        """Read back what a part lists."""
        raw = base64.b64decode(part["checksums"], validate=True)
        return cls(part["footer"], np.frombuffer(raw, "<u4"))


def _chunk_spans(group: pq.RowGroupMetaData) -> list[tuple[int, int]]:
    """(start, length) of every column chunk of a row group."""
    spans = []
    for j in range(group.num_columns):
        chunk = group.column(j)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        spans.append((start, chunk.total_compressed_size))
    return spans


class _Pieces(io.RawIOBase):
    """A file of which only some checked pieces are there."""

    def __init__(self, size: int, pieces: dict[int, bytes]) -> None:
        super().__init__()
        self._size = size
        self._starts = sorted(pieces)
        self._pieces = pieces
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = self._size - self._at if size < 0 else size
        at = bisect.bisect_right(self._starts, self._at) - 1
        start = self._starts[at] if at >= 0 else 0
        piece = self._pieces.get(start, b"")
        out = piece[self._at - start : self._at - start + size]
        if len(out) != size:
            raise OSError(f"{size} bytes from {self._at} are not in one column chunk")
        self._at += size
        return out


class PartReader:
    """Reads one listed Parquet file, one row group at a time, and refuses what is not as listed.

    Checked on every read: the file's length, its row count, and the checksums of the footer and
    of the column chunks that are read. (`Store.verify` checks the SHA-256 of the whole.)
    """

    def __init__(self, backend: Backend, folder: str, part: Part) -> None:
        self.path = f"{folder}/{part['path']}"
        self._backend = backend
        self._part = part
        self._checksums = Checksums.parse(part)
        self._check_length()
        size = part["bytes"] - part["footer"]
        footer = self._read([(part["footer"], size)], [0])[0]
        with self._errors():
            self._meta = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
            self._schema = self._meta.schema.to_arrow_schema()
        if self._meta.num_rows != part["rows"]:
            raise StoreError(
                f"{self.path}: expected {part['rows']} rows as the manifest lists, "
                f"found {self._meta.num_rows}; {_ADVICE}"
            )

    def _check_length(self) -> None:
        info = self._backend.stat(self.path)
        if info is None:
            raise StoreError(
                f"{self.path}: expected a part of {self._part['rows']} rows as the manifest "
                f"lists it, found no such file; {_ADVICE}"
            )
        if info.size != self._part["bytes"]:
            raise StoreError(
                f"{self.path}: expected {self._part['bytes']} bytes as the manifest lists, "
                f"found {info.size}; the file is truncated or was changed: {_ADVICE}"
            )

    def _read(self, spans: list[tuple[int, int]], numbers: list[int]) -> list[bytes]:
        """Bytes of the spans, whose checksums have these numbers."""
        with self._errors():
            pieces = self._backend.read_ranges(self.path, spans)
        for (start, length), number, piece in zip(spans, numbers, pieces, strict=True):
            expected = int(self._checksums.values[number])
            if len(piece) != length or zlib.crc32(piece) != expected:
                raise StoreError(
                    f"{self.path}: expected {length} bytes with CRC-32 {expected:08x} from byte "
                    f"{start}, found {len(piece)} with {zlib.crc32(piece):08x}; the file was "
                    f"damaged after it was written: {_ADVICE}"
                )
        return pieces

    @property
    def row_group_rows(self) -> list[int]:
        """Rows of each row group."""
        return [self._meta.row_group(g).num_rows for g in range(self._meta.num_row_groups)]

    def batches(
        self,
        columns: Sequence[str] | None = None,
        batch_rows: int | None = None,
        row_groups: Sequence[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Give the rows in order, holding one row group at a time.

        Raises:
            StoreError: the file is missing or damaged.
        """
        wanted = range(self._meta.num_row_groups) if row_groups is None else row_groups
        names = self._schema.names if columns is None else list(columns)
        for group in wanted:
            yield from self._group(group, names, batch_rows or schemas.WIDE_ROW_GROUP_ROWS)

    def _group(self, group: int, names: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        spans = _chunk_spans(self._meta.row_group(group))
        leaves = self._leaves(names)
        numbers = [1 + group * len(spans) + leaf for leaf in leaves]
        spans = [spans[leaf] for leaf in leaves]
        pieces = self._read(spans, numbers)
        file = _Pieces(
            self._part["bytes"],
            {start: piece for (start, _), piece in zip(spans, pieces, strict=True)},
        )
        with self._errors():
            stream = pq.ParquetFile(
                pa.PythonFile(file, "r"), metadata=self._meta, pre_buffer=False
            ).iter_batches(batch_size=batch_rows, columns=names, row_groups=[group])
        while True:
            with self._errors():
                batch = next(stream, None)
            if batch is None:
                return
            yield batch.select(names)

    def _leaves(self, names: list[str]) -> list[int]:
        """Numbers of the leaf columns under these columns, in file order."""
        leaves: list[int] = []
        number = 0
        for field in self._schema:
            count = sum(1 for _ in schemas.leaves(field.name, field.type))
            if field.name in names:
                leaves.extend(range(number, number + count))
            number += count
        return leaves

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what Arrow and the file system say into a StoreError with the path."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"{self.path}: expected a readable Parquet part, found: {error}; {_ADVICE}"
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
    if not columns:
        raise InputError(f"{what}: expected at least one column, found none")
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        raise InputError(f"{what}: expected columns among {schema.names}, found {unknown}")
    return list(columns)
