"""What is particular to an object store, against a server that speaks its protocol."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import StoreError
from prunery.storage import Manifest, Store, VectorIndex

from .rows import arguments, expected, rows, write


def test_the_server_refuses_to_create_an_object_twice(s3_store: Store) -> None:
    """The condition that everything rests on, with and without s3fs's translation."""
    backend = s3_store.backend
    assert backend.create("x.json", b"first")
    assert not backend.create("x.json", b"second")
    assert backend.read("x.json") == b"first"
    # what a repeated request meets whose first answer was lost
    assert backend.create("x.json", b"first")
    with pytest.raises(FileExistsError):
        backend._fs.pipe_file(backend._at("x.json"), b"third", mode="create")  # type: ignore[attr-defined]
    backend.replace("x.json", b"fourth")
    assert backend.read("x.json") == b"fourth"


def test_a_conflict_between_two_requests_is_repeated(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = s3_store.backend
    real, calls = backend._fs.pipe_file, []

    def conflicting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            cause = Exception()
            cause.response = {"Error": {"Code": "ConditionalRequestConflict"}}  # type: ignore[attr-defined]
            raise OSError("conflict") from cause
        return real(*args, **kwargs)

    monkeypatch.setattr(backend._fs, "pipe_file", conflicting)
    assert backend.create("x.json", b"1")
    assert len(calls) == 3


@pytest.mark.parametrize("code", ["PreconditionFailed", ""])
def test_a_refusal_in_other_words(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Servers differ in how they put it; anything else is an error, not a success."""
    backend: Any = s3_store.backend
    backend.create("x.json", b"1")

    def refusing(*args: Any, **kwargs: Any) -> Any:
        cause = Exception()
        cause.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
        raise OSError("refused") from cause

    monkeypatch.setattr(backend._fs, "pipe_file", refusing)
    if code:
        assert not backend.create("x.json", b"2")
    else:
        with pytest.raises(StoreError, match="expected an answer from the object store"):
            backend.create("x.json", b"2")


RACER = Path(__file__).with_name("racer.py")


def test_processes_race_for_one_key(
    s3_store: Store, s3_options: dict[str, Any], tmp_path: Path
) -> None:
    """Both have every shard ready before either commits."""
    options = json.dumps(s3_options)
    racers = [
        subprocess.Popen(
            [sys.executable, RACER, s3_store.uri, options, "", tmp_path, str(i), "2"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    digests = [racer.communicate(timeout=120)[0] for racer in racers]
    manifest = s3_store.manifest("chunks")
    assert digests == [manifest.logical_digest] * 2
    assert s3_store.table("chunks").to_table().equals(expected(2, 20))
    assert s3_store.verify() == []
    listed = {item["path"] for item in manifest.files()} | {"manifest.json"}
    folder = f"tables/{manifest.key}/"
    files = {info.path.removeprefix(folder) for info in s3_store.backend.walk(folder)}
    assert files == listed


def test_a_writer_that_comes_second_to_the_manifest(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is gone, the manifest there: the conditional PUT decides, not a look before."""
    with s3_store.write(**arguments()) as late:
        for i in range(2):
            with late.shard(i) as shard:
                shard.write(rows(i))
        entries = {
            info.path: s3_store.backend.read(info.path)
            for info in s3_store.backend.walk(f"work/{late.key}")
        }
        write(s3_store, shards=2)
        for path, data in entries.items():
            s3_store.backend.replace(path, data)
        real = s3_store.exists
        answers = iter([False])
        monkeypatch.setattr(s3_store, "exists", lambda key: next(answers, True) and real(key))
        manifest = late.commit()
        assert next(answers, None) is None
    assert isinstance(manifest, Manifest)
    assert manifest == s3_store.manifest(manifest.key)


def test_nothing_is_seen_before_the_manifest(s3_store: Store) -> None:
    with s3_store.write(**arguments()) as writer:
        for i in writer.pending(2):
            with writer.shard(i) as shard:
                shard.write(rows(i))
        assert s3_store.tables() == []
        assert not s3_store.exists(writer.key)
        with pytest.raises(StoreError):
            s3_store.table(writer.key)
    # the writer is gone; another one has nothing left to write
    with s3_store.write(**arguments()) as writer:
        assert writer.pending(2) == []
        writer.commit()
    assert s3_store.table("chunks").to_table().equals(expected(2))


def test_a_truncated_and_a_flipped_object(s3_store: Store) -> None:
    manifest = write(s3_store, shards=2)
    path = f"tables/{manifest.key}/{manifest.parts[1]['path']}"
    good = s3_store.backend.read(path)
    s3_store.backend.replace(path, good[:-1])
    with pytest.raises(StoreError, match="the file is truncated"):
        s3_store.table("chunks").to_table()
    flipped = bytearray(good)
    flipped[len(flipped) // 4] ^= 1
    s3_store.backend.replace(path, bytes(flipped))
    with pytest.raises(StoreError, match="damaged after it was written"):
        s3_store.table("chunks").to_table()
    assert [problem.what for problem in s3_store.verify()] == ["sha256"]
    s3_store.backend.remove(path)
    assert [problem.what for problem in s3_store.verify()] == ["missing"]


def test_an_index_is_downloaded_once_and_checked(s3_store: Store, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype("f4")
    index = VectorIndex.build(vectors, np.arange(50) + 7, threads=1)
    manifest = index.save_to(s3_store, name="index")
    table = s3_store.table("index")
    found = VectorIndex.from_table(table)
    want, got = index.search(vectors[:5], 3, threads=1), found.search(vectors[:5], 3, threads=1)
    np.testing.assert_array_equal(want[0], got[0])
    np.testing.assert_array_equal(want[1], got[1])
    path = table.attachment("index.faiss")
    assert path.is_relative_to(tmp_path / "cache")
    stamp = path.stat().st_mtime_ns
    assert table.attachment("index.faiss").stat().st_mtime_ns == stamp
    path.unlink()
    stored = next(item for item in manifest.attachments if item["name"] == "index.faiss")
    at = f"tables/{manifest.key}/{stored['path']}"
    damaged = bytearray(s3_store.backend.read(at))
    damaged[-1] ^= 1
    s3_store.backend.replace(at, bytes(damaged))
    with pytest.raises(StoreError, match="expected SHA-256"):
        table.attachment("index.faiss")
    assert not path.exists()


def test_a_missing_bucket_and_server_are_errors_not_empty_stores(
    s3_options: dict[str, Any],
) -> None:
    with pytest.raises(StoreError, match="expected the bucket 'misspelt' to exist"):
        Store("s3://misspelt/store", storage_options=s3_options).names()
    misspelt = Store("s3://misspelt/store", storage_options=s3_options)
    with pytest.raises(StoreError, match="expected the bucket 'misspelt'"):
        write(misspelt)
    closed = {
        **s3_options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2},
    }
    with pytest.raises(StoreError, match="check the endpoint, the credentials"):
        Store("s3://bucket/store", storage_options=closed).names()


def test_rows_of_many_row_groups(s3_store: Store) -> None:
    """Ranges of several row groups, fetched apart."""
    kind = pa.schema([("text", pa.string()), ("n", pa.int64())])
    n = 40_000
    table = pa.table({"text": [f"row {i}" for i in range(n)], "n": list(range(n))}, schema=kind)
    s3_store.commit_once(lambda shard: shard.write(table), name="t", step="s", schema=kind)
    read = s3_store.table("t")
    assert read.to_table().equals(table)
    assert read.to_table(["n"]).equals(table.select(["n"]))
