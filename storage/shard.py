"""One shard of a table being written: all of it becomes visible, or nothing."""

import errno
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow as pa

from ..errors import InputError, StoreError
from . import layout, schemas
from .environment import peak_memory_bytes
from .manifest import Part
from .parquet import PartWriter

if TYPE_CHECKING:
    from .writer import TableWriter


class Entry(TypedDict):
    """A journal entry: a finished shard."""

    shard: int
    part: Part
    rejects: Part | None
    kept: int
    dropped: dict[str, int]
    seconds: float
    peak_memory_bytes: int


def rejects_schema() -> pa.Schema:
    """Schema of rejected rows: the shard, why, and the row as JSON text."""
    return pa.schema(
        [
            pa.field("shard", pa.int32(), nullable=False),
            pa.field("reason", schemas.category(), nullable=False),
            pa.field("row", pa.string(), nullable=False),
        ]
    )


class ShardWriter:
    """Takes the rows of one shard. Use it as a context manager, from `TableWriter.shard`.

    On a clean exit the part is durable and stands in the journal; on an exception nothing of
    the shard is visible and its files are gone.
    """

    _REJECTS_AT_ONCE = 1024

    def __init__(self, table: "TableWriter", shard: int) -> None:
        self.shard = shard
        self._table = table
        self._kept: int | None = None
        self._dropped: Counter[str] = Counter()
        self._rejected: list[tuple[str, str]] = []
        self._rejects: PartWriter | None = None
        self._open = False

    def __enter__(self) -> "ShardWriter":
        self._started = time.perf_counter()
        with disk_errors(f"shard {self.shard}"):
            self._scratch = self._table.scratch(uuid.uuid4().hex)
            self._part = self._new_part("part", self._table.schema)
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        try:
            if kind is None:
                with disk_errors(f"shard {self.shard}"):
                    self._finish()
        finally:
            for part in (self._part, self._rejects):
                if part is not None:
                    part.abort()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Append rows of the table's schema.

        Raises:
            InputError: other columns or types, a null or a negative id where none may be.
            StoreError: the disk is full or not writable.
        """
        self._check_open()
        table = schemas.conform(rows, self._table.schema)
        with disk_errors(f"shard {self.shard}"):
            self._part.write(table)

    def reject(self, row: Mapping[str, Any], reason: str) -> None:
        """Put a row that could not be processed, as it was, into the rejects with its reason."""
        self._check_open()
        text = json.dumps(dict(row), ensure_ascii=False, default=repr)
        self._rejected.append((_storable(reason), _storable(text)))
        if len(self._rejected) >= self._REJECTS_AT_ONCE:
            self._flush_rejects()

    def count(self, *, kept: int = 0, dropped: Mapping[str, int] | None = None) -> None:
        """Add to what the step decided: how many it kept, how many it dropped for each reason.

        Without any call the rows written count as kept.
        """
        self._check_open()
        self._kept = (self._kept or 0) + _natural(kept, "kept")
        for reason, number in (dropped or {}).items():
            self._dropped[reason] += _natural(number, f"dropped[{reason!r}]")

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError(
                f"shard {self.shard} is not open; write inside `with writer.shard(i) as shard:`"
            )

    def _new_part(self, kind: str, schema: pa.Schema) -> PartWriter:
        return PartWriter(self._scratch / f"{kind}.parquet", schema, self._table.footer(self.shard))

    def _flush_rejects(self) -> None:
        if not self._rejected:
            return
        schema = rejects_schema()
        with disk_errors(f"rejects of shard {self.shard}"):
            if self._rejects is None:
                self._rejects = self._new_part("rejects", schema)
            reasons, rows = zip(*self._rejected, strict=True)
            batch = pa.record_batch(
                {
                    "shard": pa.array([self.shard] * len(rows), pa.int32()),
                    "reason": pa.array(reasons, pa.string()),
                    "row": pa.array(rows, pa.string()),
                }
            )
            self._rejects.write(schemas.conform(batch, schema))
        self._rejected.clear()

    def _finish(self) -> None:
        self._flush_rejects()
        part = self._place("part", self._part)
        rejects = self._place("rejects", self._rejects) if self._rejects else None
        self._table.record(
            Entry(
                shard=self.shard,
                part=part,
                rejects=rejects,
                kept=part["rows"] if self._kept is None else self._kept,
                dropped=dict(sorted(self._dropped.items())),
                seconds=round(time.perf_counter() - self._started, 6),
                peak_memory_bytes=peak_memory_bytes(),
            )
        )

    def _place(self, kind: str, writer: PartWriter) -> Part:
        writer.close()
        name = layout.part(kind, self.shard, writer.sha256)
        part = writer.part(name, self.shard)
        self._table.place(writer.path, name)
        return part


def _storable(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate becomes its escape."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _natural(value: int, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0:
        raise InputError(f"expected a count of at least 0 for {what}, found {value!r}")
    return int(value)


_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError while writing into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno or 0)
        advice = f"{reason}: free some and run again" if reason else "mend that and run again"
        raise StoreError(
            f"{what}: expected to write, found: {error}; {advice} "
            "(finished shards are kept and not repeated)"
        ) from error
