"""Small helpers over tables of the store, shared by the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from ..storage import Table


def kept_ids(decision: Table) -> npt.NDArray[np.int64]:
    """Sorted ids of the rows that a decision table keeps, (K,) int64."""
    found = [
        batch.column("id").filter(batch.column("keep")).to_numpy(zero_copy_only=False)
        for batch in decision.batches(columns=["id", "keep"])
    ]
    ids = np.concatenate(found) if found else np.zeros(0, np.int64)
    return np.sort(ids.astype(np.int64))


def among(ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(N,) bool: which of `ids` occur in the sorted `wanted`."""
    if not len(wanted):
        return np.zeros(len(ids), np.bool_)
    place = np.searchsorted(wanted, ids)
    place[place == len(wanted)] = 0
    return np.asarray(wanted[place] == ids, np.bool_)


def rows_by_id(
    table: Table, ids: Sequence[int] | npt.NDArray[np.int64], columns: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """The rows of those ids; StoreError where one is missing."""
    unique = np.unique(np.asarray(ids, np.int64))
    wanted = list(dict.fromkeys(["id", *columns]))
    found = {row["id"]: row for row in table.lookup(unique, columns=wanted).to_pylist()}
    if len(found) != len(unique):
        missing = next(int(i) for i in unique if int(i) not in found)
        raise StoreError(
            f"row {missing} is not in table `{table.manifest.name}` ({table.key[:12]}), although a"
            " table made from it names it. Run `prunery verify` and make the table again."
        )
    return found


def vectors_of(column: pa.ChunkedArray | pa.FixedSizeListArray) -> npt.NDArray[np.float32]:
    """A fixed-size-list column as (N, d) float32."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no chunk at all
            column = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    width = column.type.list_size
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(-1, width)


def flat(column: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Borders (N + 1,) int64 and values of a list column."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offset, np.concatenate(values) if values else np.zeros(0)


def in_order(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """Rows sorted by columns, ascending, ties in the order given."""
    return table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in by]))


def spans_of_equal(values: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal neighbours."""
    if not len(values):
        return
    borders = np.flatnonzero(np.diff(values)) + 1
    yield from pairwise([0, *borders.tolist(), len(values)])


def shard_ranges(n: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of shards of `size` rows."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]
