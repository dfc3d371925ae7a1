"""Garbage collection: what goes, and above all what stays."""

import os
import time
from pathlib import Path

import pytest

from prunery.errors import InputError, StoreError
from prunery.storage import Store

from .rows import arguments, rows, write


def age(store: Store, seconds: float = 1e6) -> None:
    """Make every file of a local store old."""
    root = Path(store.uri)
    then = time.time() - seconds
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def unfinished(store: Store, **other: object) -> str:
    with store.write(**arguments(**other)) as writer:
        writer.pending(2)
        with writer.shard(0) as shard:
            shard.write(rows(0))
        return writer.key


def test_what_nothing_needs_is_removed(store: Store) -> None:
    old = [write(store, shards=1, options={"v": v}) for v in range(3)]
    dead = unfinished(store, options={"v": "dead"}, name="dead")
    before = {info.path: info.size for info in store.backend.walk("")}
    plan = store.gc(dry_run=True, older_than_seconds=0, keep_history=1)
    assert {info.path: info.size for info in store.backend.walk("")} == before
    report = store.gc(dry_run=False, older_than_seconds=0, keep_history=1)
    assert (plan.what, plan.bytes, plan.dry_run) == (report.what, report.bytes, True)
    assert {(item.path, item.what) for item in report.what} == {
        (f"tables/{old[0].key}", "table"),
        (f"tables/{dead}", "unfinished"),
        (f"work/{dead}", "work"),
    }
    after = {info.path: info.size for info in store.backend.walk("")}
    gone = {path: size for path, size in before.items() if path not in after}
    assert sum(gone.values()) == report.bytes > 0
    assert [m.key for m in store.tables()] == [m.key for m in old[1:]] or len(store.tables()) == 2
    assert store.names() == {"chunks": old[2].key}
    assert store.verify() == []
    assert store.gc(dry_run=False, older_than_seconds=0, keep_history=1).what == ()


def test_ancestors_of_what_is_kept_stay(local_store: Store) -> None:
    store = local_store
    source = write(store, shards=1, name="tmp", options={"v": 0})
    middle = write(store, shards=1, name="tmp", options={"v": 1}, inputs=[source.key])
    write(store, shards=1, name="final", options={"v": 2}, inputs=[middle.key])
    other = write(store, shards=1, name="tmp", options={"v": 3})
    report = store.gc(dry_run=False, older_than_seconds=0, keep_history=0)
    assert report.what == ()
    store.point("final", other.key)
    removed = store.gc(dry_run=False, older_than_seconds=0, keep_history=0)
    assert len(removed.what) == 3
    assert [m.key for m in store.tables()] == [other.key]


def test_what_is_young_stays_with_its_ancestors(local_store: Store) -> None:
    store = local_store
    source = write(store, shards=1, name="a", options={"v": 0})
    age(store)
    child = write(store, shards=1, name="a", options={"v": 1}, inputs=[source.key])
    waiting = unfinished(store, options={"v": 2}, inputs=[source.key])
    write(store, shards=1, name="a", options={"v": 3})
    assert store.gc(dry_run=False, older_than_seconds=3600, keep_history=0).what == ()
    age(store)
    gone = store.gc(dry_run=False, older_than_seconds=3600, keep_history=0)
    assert {item.path for item in gone.what} == {
        f"tables/{source.key}", f"tables/{child.key}", f"tables/{waiting}", f"work/{waiting}",
    }  # fmt: skip


def test_the_inputs_of_work_to_be_resumed_stay(local_store: Store) -> None:
    store = local_store
    source = write(store, shards=1, name="a", options={"v": 0})
    write(store, shards=1, name="a", options={"v": 1})
    age(store)
    unfinished(store, options={"v": 2}, inputs=[source.key])
    assert store.gc(dry_run=False, older_than_seconds=3600, keep_history=0).what == ()


def test_a_live_writer_and_what_it_reads_stay(local_store: Store) -> None:
    store = local_store
    grandparent = write(store, shards=1, name="a", options={"v": 0})
    source = write(store, shards=1, name="a", options={"v": 1}, inputs=[grandparent.key])
    write(store, shards=1, name="a", options={"v": 2})
    with store.write(**arguments(inputs=[source.key])) as writer:
        writer.pending(2)
        with writer.shard(0) as shard:
            shard.write(rows(0))
            age(store)
            for dry_run in (True, False):
                assert store.gc(dry_run=dry_run, older_than_seconds=0, keep_history=0).what == ()
            with pytest.raises(StoreError, match="found a writer that makes or reads it"):
                store.remove(source.key)
        age(store)
        assert store.gc(dry_run=False, older_than_seconds=0, keep_history=0).what == ()
        with writer.shard(1) as shard:
            shard.write(rows(1))
        manifest = writer.commit()
    assert [m.key for m in store.lineage(manifest.key)] == [
        grandparent.key, source.key, manifest.key,
    ]  # fmt: skip
    assert store.verify() == []


def test_a_writer_that_reuses_a_table_keeps_it(local_store: Store) -> None:
    store = local_store
    kept = write(store, shards=1, name="a", options={"v": 0})
    write(store, shards=1, name="a", options={"v": 1})
    age(store)
    with store.write(**arguments(options={"v": 0})) as writer:
        assert writer.committed
        assert store.gc(dry_run=False, older_than_seconds=0, keep_history=0).what == ()
        writer.commit()
    assert store.gc(dry_run=False, older_than_seconds=0, keep_history=0).what == ()
    assert store.names()["chunks"] == kept.key


def test_files_that_no_manifest_lists_are_removed(local_store: Store) -> None:
    store = local_store
    manifest = write(store, shards=1)
    strays = [
        f"tables/{manifest.key}/part-00000-000000000000.parquet",
        f"tables/{manifest.key}/.manifest.json.abc.tmp",
        f"work/{manifest.key}/tmp/x/part.parquet",
        "names/.chunks.json.abc.tmp",
        f"tables/{'0' * 64}/part-00000-000000000000.parquet",
    ]
    for path in strays:
        store.backend.replace(path, b"12345")
    foreign = Path(store.uri, "tables", "notes.txt")
    foreign.write_text("not ours")
    assert store.gc(dry_run=False, older_than_seconds=3600).what == ()
    report = store.gc(dry_run=False, older_than_seconds=0)
    assert report.bytes == 25
    assert {item.what for item in report.what} == {"orphan", "work", "temporary", "unfinished"}
    assert not any(store.backend.stat(path) for path in strays)
    assert foreign.exists()
    assert store.verify() == []


def test_a_damaged_manifest_stops_it(local_store: Store) -> None:
    """Its ancestors are unknown, so nothing may be called unneeded."""
    store = local_store
    source = write(store, shards=1, name="a", options={"v": 0})
    child = write(store, shards=1, name="a", options={"v": 1}, inputs=[source.key])
    store.backend.replace(f"tables/{child.key}/manifest.json", b"{}")
    with pytest.raises(StoreError, match="expected manifest format"):
        store.gc(dry_run=False, older_than_seconds=0, keep_history=0)
    assert store.exists(source.key)
    store.remove(child.key)
    store.gc(dry_run=False, older_than_seconds=0, keep_history=0)
    assert not store.exists(source.key)


def test_limits_are_checked(local_store: Store) -> None:
    for wrong in ({"older_than_seconds": -1.0}, {"keep_history": -1}):
        with pytest.raises(InputError, match="at least 0"):
            local_store.gc(**wrong)  # type: ignore[arg-type]
