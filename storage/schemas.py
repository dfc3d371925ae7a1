"""Arrow schemas: which ones tables may have, how they are written down, their Parquet settings."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError

# A row group holds at most this many rows: few where a row is wide (text, lists, vectors),
# so that a reader of some rows does not decode the rest, more where rows are a few numbers.
WIDE_ROW_GROUP_ROWS = 16_384
NARROW_ROW_GROUP_ROWS = 131_072
ROW_GROUP_BYTES = 64 << 20


def id_field() -> pa.Field:
    """The column `id`: the row id (`row_id`), int64 >= 0, never null."""
    return pa.field("id", pa.int64(), nullable=False)


def vector(d: int) -> pa.DataType:
    """The type of an embedding column: `fixed_size_list<float32>[d]`."""
    if d < 1:
        raise InputError(f"expected a vector length of at least 1, found {d}")
    return pa.list_(pa.field("element", pa.float32(), nullable=False), d)


def category() -> pa.DataType:
    """The type of a column with few different strings (reasons, languages): dictionary-encoded."""
    return pa.dictionary(pa.int32(), pa.string())


def empty() -> pa.Schema:
    """The schema of an artefact without rows (a report)."""
    return pa.schema([])


def canonical_type(kind: pa.DataType) -> str:
    """Spell a type by what its values are, whatever the encoding.

    Dictionary encoding and 64-bit offsets make no difference, nor do the names that
    writers give to list elements, nor the nullable flags.

    Raises:
        InputError: a type that the store does not hold.
    """
    t = pa.types
    if t.is_dictionary(kind):
        return canonical_type(kind.value_type)
    if t.is_string(kind) or t.is_large_string(kind):
        return "string"
    if t.is_binary(kind) or t.is_large_binary(kind):
        return "binary"
    if t.is_fixed_size_list(kind):
        return f"list<{canonical_type(kind.value_type)}>[{kind.list_size}]"
    if t.is_list(kind) or t.is_large_list(kind):
        return f"list<{canonical_type(kind.value_type)}>"
    if t.is_map(kind):
        return f"map<{canonical_type(kind.key_type)},{canonical_type(kind.item_type)}>"
    if t.is_struct(kind):
        inner = ",".join(f"{f.name!r}:{canonical_type(f.type)}" for f in kind)
        return f"struct<{inner}>"
    if _is_plain(kind):
        return str(kind)
    raise InputError(
        f"expected a type the store can hold (numbers, bool, string, binary, dates and times, "
        f"decimal, list, struct, map, dictionary), found {kind}; cast the column first"
    )


def _is_plain(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_null(kind)
        or t.is_boolean(kind)
        or t.is_integer(kind)
        or t.is_floating(kind)
        or (t.is_temporal(kind) and not t.is_interval(kind))
        or t.is_decimal128(kind)
        or t.is_decimal256(kind)
        or t.is_fixed_size_binary(kind)
    )


def canonical(schema: pa.Schema) -> list[list[str]]:
    """Give `[name, canonical type]` of every column, the part of a schema that a digest covers."""
    return [[field.name, canonical_type(field.type)] for field in schema]


def check(schema: Any) -> pa.Schema:
    """Return the schema if tables may have it.

    Raises:
        InputError: not a schema, a name twice, a type the store does not hold, or a column
            `id` that is not int64.
    """
    if not isinstance(schema, pa.Schema):
        raise InputError(f"expected a pyarrow.Schema, found {type(schema).__name__}")
    names = schema.names
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"expected every column once in a schema, found more than once: {twice}")
    for field in schema:
        try:
            _check_field(field)
        except InputError as error:
            raise InputError(f"column {field.name!r}: {error}") from None
    if "id" in names and schema.field("id").type != pa.int64():
        raise InputError(
            f"expected column 'id' to hold row ids as int64, found {schema.field('id').type}; "
            "use prunery.storage.row_ids"
        )
    return schema.remove_metadata()


def _check_field(field: pa.Field) -> None:
    if "." in field.name:
        # what Parquet puts between the levels of a nested column
        raise InputError(f"expected a name without '.', found {field.name!r}; rename it")
    if pa.types.is_struct(field.type):
        for child in field.type:
            _check_field(child)
    elif pa.types.is_nested(field.type):
        for i in range(field.type.num_fields):
            _check_field(field.type.field(i))
    canonical_type(field.type)


def describe(schema: pa.Schema) -> list[dict[str, Any]]:
    """Give name, type and nullability of every column, for people."""
    return [{"name": f.name, "type": str(f.type), "nullable": f.nullable} for f in schema]


def to_text(schema: pa.Schema) -> str:
    """Serialise a schema exactly (Arrow IPC, base64)."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def from_text(text: str) -> pa.Schema:
    """Read what `to_text` wrote."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))


def conform(batch: pa.RecordBatch | pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows as a table of exactly this schema, casting encodings but never values.

    Raises:
        InputError: other columns, another order, another type, a null where none may be, or
            a negative id.
    """
    table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    if not isinstance(table, pa.Table):
        raise InputError(
            f"expected a pyarrow.RecordBatch or pyarrow.Table, found {type(batch).__name__}"
        )
    if table.schema.names != schema.names:
        raise InputError(
            f"expected the columns {schema.names} in this order, found {table.schema.names}; "
            "select and name them as the table's schema says"
        )
    columns = [_conform_column(table.column(i), field) for i, field in enumerate(schema)]
    return pa.Table.from_arrays(columns, schema=schema)


def _conform_column(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if column.type != field.type:
        if canonical_type(column.type) != canonical_type(field.type):
            raise InputError(
                f"column {field.name!r}: expected {field.type}, found {column.type}; "
                "cast it before writing"
            )
        column = _recode(column, field.type)
    if not field.nullable and column.null_count:
        row = column.is_null().index(True).as_py()
        raise InputError(
            f"column {field.name!r}: expected no nulls, found {column.null_count}, "
            f"the first in row {row} of this batch"
        )
    if field.name == "id" and len(column):
        lowest = pc.min(column).as_py()
        if lowest is not None and lowest < 0:
            raise InputError(
                f"column 'id': expected row ids >= 0, found {lowest}; use prunery.storage.row_ids"
            )
    return column


def _recode(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(kind) and not pa.types.is_dictionary(column.type):
        encoded = column.cast(kind.value_type).dictionary_encode()
        return encoded if encoded.type == kind else encoded.cast(kind)
    return column.cast(kind)


@dataclass(frozen=True, slots=True)
class ParquetSettings:
    """How the columns of a schema are laid out in Parquet."""

    dictionary: list[str]
    byte_stream_split: list[str]
    row_group_rows: int

    @classmethod
    def of(cls, schema: pa.Schema) -> "ParquetSettings":
        """Choose by type.

        Dictionary pages only where the schema says `category()`: ids, text and vectors
        seldom repeat and would only be copied twice. Byte-stream-split for
        floats: it puts the exponents side by side, where zstd finds them (sentence embeddings
        take 85 % of their raw bytes instead of 92 %: benchmarks/storage.py encodings).
        """
        paths = [leaf for field in schema for leaf in leaves(field.name, field.type)]
        wide = any(_is_wide(field.type) for field in schema)
        return cls(
            dictionary=[path for path, kind in paths if pa.types.is_dictionary(kind)],
            byte_stream_split=[path for path, kind in paths if pa.types.is_floating(kind)],
            row_group_rows=WIDE_ROW_GROUP_ROWS if wide else NARROW_ROW_GROUP_ROWS,
        )


def leaves(path: str, kind: pa.DataType) -> Iterable[tuple[str, pa.DataType]]:
    """Give the Parquet path and type of every leaf column under one field, in file order."""
    t = pa.types
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        yield from leaves(f"{path}.list.element", kind.value_type)
    elif t.is_map(kind):
        yield from leaves(f"{path}.key_value.key", kind.key_type)
        yield from leaves(f"{path}.key_value.value", kind.item_type)
    elif t.is_struct(kind):
        for field in kind:
            yield from leaves(f"{path}.{field.name}", field.type)
    else:
        yield path, kind


def _is_wide(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_nested(kind)
        or t.is_string(kind)
        or t.is_large_string(kind)
        or t.is_binary(kind)
        or t.is_large_binary(kind)
    )


def with_metadata(schema: pa.Schema, entries: Mapping[str, str]) -> pa.Schema:
    """Attach `prunery.<name>` key-value metadata for the Parquet footer."""
    return schema.with_metadata({f"prunery.{name}": text for name, text in entries.items()})
