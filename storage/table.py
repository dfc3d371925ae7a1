"""Reading a committed table: in order, in bounded memory, and only what its manifest lists."""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import InputError, StoreError
from . import layout
from .backend import Backend
from .ids import file_digest
from .manifest import Attachment, Manifest, Part
from .parquet import PartReader, check_columns
from .shard import rejects_schema

# Up to this many rows `lookup` keeps the ids in memory (16 bytes each) between calls.
_INDEXED_ROWS = 1 << 24


class Table:
    """A committed table. Made by `Store.table`; nothing is read before it is asked for.

    Attributes:
        manifest: what the table consists of and how it came about.
        key: its content key.
        schema: the Arrow schema of its rows.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self.manifest = manifest
        self.key = manifest.key
        self.schema: pa.Schema = manifest.pa_schema()
        self._backend = backend
        self._folder = layout.table(manifest.key)
        self._id_index: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def __repr__(self) -> str:
        return f"Table({self.manifest.name!r}, {self.key[:12]}, {self.num_rows} rows)"

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return self.manifest.rows

    def batches(
        self, columns: Sequence[str] | None = None, batch_rows: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Give all rows in order, holding one row group at a time.

        Args:
            columns: the ones to read, in this order; None for all.
            batch_rows: at most so many rows in a batch; None for 16,384.

        Raises:
            InputError: an unknown column, or `batch_rows` below 1.
            StoreError: a part is missing, truncated, damaged or not as listed.
        """
        wanted = self._check(columns, batch_rows)
        return self._batches(self.manifest.parts, wanted, batch_rows)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once; they must fit into memory. Raises as `batches`."""
        batches = list(self.batches(columns))
        return pa.Table.from_batches(batches, schema=self._selected(columns))

    def shards(self) -> list[int]:
        """Return the numbers of the shards, in order."""
        return [part["shard"] for part in self.manifest.parts]

    def shard_batches(
        self, i: int, columns: Sequence[str] | None = None, batch_rows: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Give the rows of one shard in order. Raises as `batches`."""
        wanted = self._check(columns, batch_rows)
        parts = [part for part in self.manifest.parts if part["shard"] == i]
        if not parts:
            raise InputError(f"{self!r}: expected a shard among {self.shards()}, found {i!r}")
        return self._batches(parts, wanted, batch_rows)

    def lookup(
        self,
        ids: Iterable[int],
        columns: Sequence[str] | None = None,
        *,
        missing: Literal["error", "skip"] = "error",
    ) -> pa.Table:
        """Return the rows with these ids, in the order of `ids`.

        An id that several rows have (a table of sentences by passage) gives all of them, in
        table order. Only the id column is read whole, then the row groups with a hit.

        Raises:
            InputError: the table has no ids, or an id is not in it (unless `missing="skip"`).
            StoreError: as `batches`.
        """
        wanted = self._check(columns, None)
        if "id" not in self.schema.names:
            raise InputError(f"{self!r}: expected a column 'id' to look rows up, found none")
        asked = np.fromiter((int(i) for i in ids), dtype=np.int64)
        rows, found = self._positions(asked)
        if missing == "error" and not found.all():
            absent = asked[~found]
            raise InputError(
                f"{self!r}: expected rows with all {len(asked)} ids, found none for "
                f"{len(absent)}: {absent[:5].tolist()}; pass missing='skip' to leave them out"
            )
        return self._take(rows, wanted)

    def rejects(self) -> pa.Table:
        """Return the rejected rows: shard, reason, and the row as JSON text."""
        batches = list(self._batches(self.manifest.rejects, None, None))
        return pa.Table.from_batches(batches, schema=rejects_schema())

    def reject_reasons(self, most: int) -> list[str]:
        """Return why the first rows were rejected, `most` of them at most."""
        reasons: list[str] = self.rejects().column("reason").to_pylist()[:most]
        return reasons

    def attachment(self, name: str) -> Path:
        """Return the local path of an attached file, which may be mapped into memory.

        From an object store it is downloaded once, checked, and kept in the cache folder
        (`PRUNERY_CACHE`, else `~/.cache/prunery`).

        Raises:
            InputError: no attachment of that name.
            StoreError: it is missing or not as listed.
        """
        listed = {item["name"]: item for item in self.manifest.attachments}
        if name not in listed:
            raise InputError(
                f"{self!r}: expected an attachment among {sorted(listed)}, found {name!r}"
            )
        item = listed[name]
        path = f"{self._folder}/{item['path']}"
        info = self._backend.stat(path)
        if info is None or info.size != item["bytes"]:
            found = "no such file" if info is None else f"{info.size}"
            raise StoreError(
                f"{path}: expected {item['bytes']} bytes as the manifest lists, found {found}; "
                "remove the table and run its step again"
            )
        return self._backend.local(path) or self._download(item, path)

    # -- helpers -------------------------------------------------------------------------------

    def _check(self, columns: Sequence[str] | None, batch_rows: int | None) -> list[str] | None:
        if batch_rows is not None and batch_rows < 1:
            raise InputError(f"expected batches of at least 1 row, found batch_rows={batch_rows}")
        return check_columns(self.schema, columns, repr(self))

    def _selected(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        return pa.schema([self.schema.field(name) for name in columns])

    def _batches(
        self, parts: Sequence[Part], columns: list[str] | None, batch_rows: int | None
    ) -> Iterator[pa.RecordBatch]:
        for part in parts:
            for batch in PartReader(self._backend, self._folder, part).batches(columns, batch_rows):
                yield batch.replace_schema_metadata(None)

    def _ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All ids sorted, and the row of each; equal ids in row order."""
        if self._id_index is not None:
            return self._id_index
        chunks = [np.asarray(batch.column(0)) for batch in self.batches(["id"])]
        ids = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
        order = np.argsort(ids, kind="stable")
        index = ids[order], order
        if len(ids) <= _INDEXED_ROWS:
            self._id_index = index
        return index

    def _positions(self, asked: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of the asked ids in their order, and which ids have any."""
        ids, order = self._ids()
        first = np.searchsorted(ids, asked, side="left")
        counts = np.searchsorted(ids, asked, side="right") - first
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return order[np.repeat(first, counts) + steps], counts > 0

    def _take(self, rows: NDArray[np.int64], columns: list[str] | None) -> pa.Table:
        """Rows by their place in the table, in the given order."""
        wanted, back = np.unique(rows, return_inverse=True)
        pieces: list[pa.RecordBatch] = []
        start = 0
        for part in self.manifest.parts:
            stop = start + part["rows"]
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(inside):
                reader = PartReader(self._backend, self._folder, part)
                pieces.extend(_take_from(reader, inside, columns))
            start = stop
        schema = self._selected(columns)
        table = pa.Table.from_batches(
            [piece.replace_schema_metadata(None) for piece in pieces], schema=schema
        )
        return table.take(pa.array(back)) if len(rows) else table

    def _download(self, item: Attachment, path: str) -> Path:
        home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
        target = Path(home, "attachments", item["sha256"], item["name"])
        if target.exists() and target.stat().st_size == item["bytes"]:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._backend.open(path) as source, open(temporary, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            found = file_digest(temporary)
            if found != item["sha256"]:
                raise StoreError(
                    f"{path}: expected SHA-256 {item['sha256']}, found {found}; "
                    "remove the table and run its step again"
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


def _take_from(
    reader: PartReader, rows: NDArray[np.int64], columns: list[str] | None
) -> Iterator[pa.RecordBatch]:
    """Rows of one part, ascending; row groups without any are not read."""
    start = 0
    for group, size in enumerate(reader.row_group_rows):
        inside = rows[(rows >= start) & (rows < start + size)] - start
        if len(inside):
            offset = 0
            for batch in reader.batches(columns, row_groups=[group]):
                here = inside[(inside >= offset) & (inside < offset + batch.num_rows)] - offset
                if len(here):
                    yield batch.take(pa.array(here))
                offset += batch.num_rows
        start += size
