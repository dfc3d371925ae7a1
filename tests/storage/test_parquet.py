"""How parts are laid out in Parquet, and that tables larger than memory pass through."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunery.storage import Store, schemas
from prunery.storage.schemas import ParquetSettings

from .rows import write

STREAMER = Path(__file__).with_name("streamer.py")


def stored(store: Store, name: str, number: int = 0) -> pq.FileMetaData:
    manifest = store.manifest(name)
    path = store.backend.local(f"tables/{manifest.key}/{manifest.parts[number]['path']}")
    return pq.read_metadata(path)


def test_encodings_and_metadata(local_store: Store) -> None:
    manifest = write(local_store, n=100)
    meta = stored(local_store, "chunks", 1)
    group = meta.row_group(0)
    columns = {group.column(j).path_in_schema: group.column(j) for j in range(group.num_columns)}
    assert set(columns) == {
        "id", "text", "score", "reason", "offsets.list.element", "vector.list.element",
    }  # fmt: skip
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for path, column in columns.items():
        split = "BYTE_STREAM_SPLIT" in column.encodings
        dictionary = "RLE_DICTIONARY" in column.encodings
        assert split == (path in ("score", "vector.list.element")), path
        assert dictionary == (path == "reason"), path
    footer = {k.decode(): v.decode() for k, v in meta.metadata.items() if k[:7] == b"prunery"}
    assert footer["prunery.key"] == manifest.key
    assert footer["prunery.step"] == "chunk"
    assert footer["prunery.schema_version"] == "1"
    assert footer["prunery.shard"] == "1"
    # any other reader of Parquet can read it
    path = local_store.backend.local(f"tables/{manifest.key}/{manifest.parts[1]['path']}")
    assert (
        pq.read_table(path)["text"].to_pylist()
        == (local_store.table("chunks").to_table(["text"])["text"].to_pylist()[100:200])
    )


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (pa.schema([("a", pa.int64()), ("b", pa.float32())]), 131_072),
        (pa.schema([("a", pa.int64()), ("b", pa.string())]), 16_384),
        (pa.schema([("a", schemas.vector(8))]), 16_384),
        (pa.schema([("a", schemas.category())]), 131_072),
    ],
)
def test_row_groups_fit_the_width_of_rows(kind: pa.Schema, rows: int) -> None:
    assert ParquetSettings.of(kind).row_group_rows == rows


def test_settings_of_nested_columns() -> None:
    kind = pa.schema(
        [
            ("spans", pa.list_(pa.struct([("start", pa.int32()), ("score", pa.float32())]))),
            ("by", pa.map_(pa.string(), pa.float64())),
            ("tags", pa.list_(schemas.category())),
        ]
    )
    settings = ParquetSettings.of(kind)
    assert settings.byte_stream_split == ["spans.list.element.score", "by.key_value.value"]
    assert settings.dictionary == ["tags.list.element"]


def test_nested_columns_are_read_alone(local_store: Store) -> None:
    """The checks of column chunks count leaves, not columns."""
    kind = pa.schema(
        [
            ("spans", pa.list_(pa.struct([("start", pa.int32()), ("score", pa.float32())]))),
            ("by", pa.map_(pa.string(), pa.float64())),
            ("n", pa.int64()),
        ]
    )
    table = pa.table(
        {
            "spans": [[{"start": 1, "score": 0.5}], [], None],
            "by": [[("a", 1.0)], None, []],
            "n": [1, 2, 3],
        },
        schema=kind,
    )
    local_store.commit_once(lambda s: s.write(table), name="t", step="s", schema=kind)
    read = local_store.table("t")
    assert read.to_table().equals(table)
    for names in (["n"], ["by"], ["spans"], ["n", "spans"]):
        assert read.to_table(names).equals(table.select(names))
    assert local_store.verify() == []


def test_small_batches_do_not_become_small_row_groups(local_store: Store) -> None:
    kind = pa.schema([("text", pa.string())])
    table = pa.table({"text": [f"row {i}" for i in range(40_000)]}, schema=kind)

    def write_in(pieces: int, name: str) -> None:
        def produce(shard: Any) -> None:
            for start in range(0, table.num_rows, pieces):
                shard.write(table.slice(start, pieces))

        local_store.commit_once(
            produce, name=name, step="s", schema=kind, options={"pieces": pieces}
        )

    write_in(37, "small")
    write_in(50_000, "large")
    for name in ("small", "large"):
        meta = stored(local_store, name)
        rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        assert rows == [16_384, 16_384, 7_232]
    small, large = local_store.manifest("small"), local_store.manifest("large")
    assert small.logical_digest == large.logical_digest


def test_wide_rows_are_cut_by_bytes(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "ROW_GROUP_BYTES", 100_000)
    kind = pa.schema([("text", pa.string())])
    table = pa.table({"text": ["x" * 10_000] * 100}, schema=kind)

    def one_by_one(shard: Any) -> None:
        for i in range(100):
            shard.write(table.slice(i, 1))

    local_store.commit_once(one_by_one, name="one", step="s", schema=kind)
    at_once = {"options": {"n": 1}, "name": "all", "step": "s", "schema": kind}
    local_store.commit_once(lambda s: s.write(table), **at_once)
    for name in ("one", "all"):
        meta = stored(local_store, name)
        largest = max(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
        assert 5 <= largest <= 10
        assert local_store.table(name).to_table().equals(table)


def test_a_table_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """360 MB of vectors pass through a writer and a reader whose memory grows by far less."""
    passed = {}
    for mode in ("write", "read"):
        done = subprocess.run(
            [sys.executable, STREAMER, mode, tmp_path / "store", "360"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        passed[mode] = json.loads(done.stdout)
    assert passed["read"]["bytes"] > 360e6
    for mode, found in passed.items():
        assert found["growth"] < 180e6, mode


def test_every_column_kind_round_trips_through_dictionaries_and_nulls(local_store: Store) -> None:
    kind = pa.schema(
        [
            ("when", pa.timestamp("us", "UTC")),
            ("day", pa.date32()),
            ("price", pa.decimal128(10, 2)),
            ("raw", pa.binary()),
            ("half", pa.float16()),
            ("flag", pa.bool_()),
            ("wide", pa.large_string()),
        ]
    )
    arrays = [
        pa.array([0, None], pa.int64()).cast(pa.timestamp("us", "UTC")),
        pa.array([None, 20_000], pa.int32()).cast(pa.date32()),
        pa.array(["1.25", None]).cast(pa.decimal128(10, 2)),
        pa.array([b"\x00\xff", None]),
        pa.array(np.array([0.5, np.nan], np.float16)),
        pa.array([None, True]),
        pa.array(["a", None], pa.large_string()),
    ]
    table = pa.Table.from_arrays(arrays, schema=kind)
    local_store.commit_once(lambda s: s.write(table), name="t", step="s", schema=kind)
    found = local_store.table("t").to_table()
    assert found.schema == kind
    half = kind.names.index("half")
    assert found.remove_column(half).equals(table.remove_column(half))
    np.testing.assert_array_equal(found["half"].to_numpy(), table["half"].to_numpy())
    assert local_store.verify() == []
