"""Rows of a table as JSON of bounded size, with what was cut marked.

As in proto3's JSON mapping, 64-bit integers are strings (a browser's numbers lose row ids) and
floats that are no numbers are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ..errors import InputError
from ..storage import Table

_ITEMS = 16  # of a list or a mapping
_BYTES = 24
_DEPTH = 4
_SAFE = 2**53 - 1
PAGE_BYTES = 2 * 2**20
"""About the most text of one page; past it a page has fewer rows than asked for."""


@dataclass(slots=True)
class Page:
    """Some rows of a table.

    Attributes
    ----------
    rows
        Column to value.
    shortened
        What was cut: row (its place on this page), column, whole size, and its unit.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    shortened: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], wide: frozenset[str], characters: int) -> int:
        """Put a row on the page; about how many characters it took."""
        made: dict[str, Any] = {}
        for name, value in row.items():
            cell, whole, unit = _cell(value, characters, 0)
            if name in wide and isinstance(cell, int) and not isinstance(cell, bool):
                cell = str(cell)
            made[name] = cell
            if unit:
                self.shortened.append(
                    {"row": len(self.rows), "column": name, "size": whole, "unit": unit}
                )
        self.rows.append(made)
        return sum(len(str(value)) for value in made.values())


def page_of(
    table: Table, offset: int, limit: int, columns: Sequence[str] | None, characters: int
) -> Page:
    """Rows [offset, offset + limit) in the table's order; fewer where they are large.

    Parts before the offset are not opened.

    Raises
    ------
    InputError
        A column is unknown.
    StoreError
        A part is missing or damaged.
    """
    known = table.schema.names
    unknown = [name for name in columns or () if name not in known]
    if unknown:
        raise InputError(
            f"no column {', '.join(f'`{name:.60}`' for name in unknown[:5])} in"
            f" `{table.manifest.name}`; there are: {', '.join(known) or 'none'}."
        )
    wide = wide_columns(table.schema)
    page, taken = Page(), 0
    if not known:
        return page
    for row in _rows(table, offset, limit, columns):
        taken += page.add(row, wide, characters)
        if taken > PAGE_BYTES:
            break
    return page


def wide_columns(schema: pa.Schema) -> frozenset[str]:
    """Names of the columns of 64-bit integers, which are given as strings."""
    kinds = (pa.int64(), pa.uint64())
    return frozenset(one.name for one in schema if one.type in kinds)


def _rows(
    table: Table, offset: int, limit: int, columns: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    sizes: dict[int, int] = {}
    for part in table.manifest.parts:
        sizes[part["shard"]] = sizes.get(part["shard"], 0) + part["rows"]
    at = 0
    for shard, size in sizes.items():
        if at + size <= offset:
            at += size
            continue
        for batch in table.shard_batches(shard, columns=columns):
            first, last = max(offset - at, 0), min(offset + limit - at, batch.num_rows)
            at += batch.num_rows
            # Row by row: a page may end long before a batch of large rows does.
            for row in range(first, last):
                yield batch.slice(row, 1).to_pylist()[0]
            if at >= offset + limit:
                return


def _cell(value: Any, characters: int, depth: int) -> tuple[Any, int, str]:
    """(what is shown, whole size, its unit or "" where nothing was cut)."""
    if value is None or isinstance(value, bool):
        return value, 0, ""
    if isinstance(value, int):
        return (value if abs(value) <= _SAFE else str(value)), 0, ""
    if isinstance(value, float):
        return plain_float(value), 0, ""
    if isinstance(value, str):
        if len(value) <= characters:
            return value, 0, ""
        return value[:characters] + "…", len(value), "characters"
    if isinstance(value, bytes):
        shown = value[:_BYTES].hex()
        if len(value) <= _BYTES:
            return shown, 0, ""
        return shown + "…", len(value), "bytes"
    if isinstance(value, Mapping):
        return _mapping(value, characters, depth)
    if isinstance(value, list | tuple):
        return _list(value, characters, depth)
    return str(value)[:characters], 0, ""


def _mapping(value: Mapping[str, Any], characters: int, depth: int) -> tuple[Any, int, str]:
    if depth >= _DEPTH:
        return "…", len(value), "fields"
    made, cut = {}, False
    for name, item in list(value.items())[:_ITEMS]:
        made[str(name)], _, unit = _cell(item, characters, depth + 1)
        cut |= bool(unit)
    cut |= len(value) > _ITEMS
    return made, len(value), "fields" if cut else ""


def _list(value: Sequence[Any], characters: int, depth: int) -> tuple[Any, int, str]:
    if depth >= _DEPTH:
        return "…", len(value), "items"
    cells = [_cell(item, characters, depth + 1) for item in value[:_ITEMS]]
    cut = len(value) > _ITEMS or any(unit for _, _, unit in cells)
    return [cell for cell, _, _ in cells], len(value), "items" if cut else ""


def plain_float(value: float) -> float | str:
    """A number that JSON can hold."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def plain(value: Any) -> Any:
    """Nested values with integers that a browser cannot hold as strings; nothing is cut."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return plain_float(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _SAFE:
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)
