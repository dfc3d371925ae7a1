"""Clocks that jump by a day: nothing live is removed, nothing waits for a day."""

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prunery.storage import Store

from .rows import arguments, expected, rows, write

DAY = 86_400.0


@pytest.fixture(params=[DAY, -DAY, 400 * DAY], ids=["ahead", "behind", "a year ahead"])
def jump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds by which the wall clock jumps when a test calls `jumped`."""
    seconds: float = request.param
    return seconds


def jumped(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real = time.time

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Shifted":
            return cls.fromtimestamp(real() + seconds, tz)

    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    monkeypatch.setattr(datetime, "datetime", Shifted)


def test_collecting_after_a_jump_leaves_live_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A writer is known to live by its lock, not by the age of its files."""
    store = Store(tmp_path / "store")
    with store.write(**arguments()) as writer:
        for i in writer.pending(3)[:2]:
            with writer.shard(i) as shard:
                shard.write(rows(i))
        jumped(monkeypatch, jump)
        # What it holds counts as live however old its files look.
        removed = Store(tmp_path / "store").gc(dry_run=False, older_than_seconds=0.0)
        assert removed.what == ()
        assert writer.pending(3) == [2]
        with writer.shard(2) as shard:
            shard.write(rows(2))
        writer.commit()
    assert store.table("chunks").to_table().equals(expected())
    assert store.verify() == []


def test_named_tables_and_what_they_were_made_from_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    store = Store(tmp_path / "store")
    source = write(store)
    write(store, name="made", step="made", inputs=[source.key], salt="m")
    jumped(monkeypatch, jump)
    assert store.gc(dry_run=False).what == ()
    assert store.verify() == []


def test_names_follow_the_order_of_pointing_and_not_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    store = Store(tmp_path / "store")
    first = write(store)
    jumped(monkeypatch, jump)
    second = write(store, salt="new", options={"salt": "new"})
    assert store.history("chunks") == [second.key, first.key]
    assert store.table("chunks").to_table().equals(expected(salt="new"))
    assert {one.key for one in store.tables()} == {first.key, second.key}


def test_unfinished_work_outlives_its_writer_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """What is lost at most is time: a collection with a clock ahead takes what the dead left."""
    store = Store(tmp_path / "store")
    with store.write(**arguments()) as writer:
        for i in writer.pending(3)[:2]:
            with writer.shard(i) as shard:
                shard.write(rows(i))
    jumped(monkeypatch, jump)
    store.gc(dry_run=False)
    with store.write(**arguments()) as writer:
        left = writer.pending(3)
        assert left == ([2] if jump < 0 else [0, 1, 2])
    write(store)
    assert store.table("chunks").to_table().equals(expected())


def test_files_from_the_future_are_young(tmp_path: Path) -> None:
    """As after a clock that was ahead and was set right."""
    store = Store(tmp_path / "store")
    key = write(store).key
    store.remove(key)
    with store.write(**arguments()) as writer, writer.shard(0) as shard:
        shard.write(rows(0))
    future = time.time() + 400 * DAY
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (future, future))
    assert store.gc(dry_run=False).what == ()
    with store.write(**arguments()) as writer:
        assert writer.pending(3) == [1, 2]


COLLECTOR = """
import json, sys, time
from prunery.storage import Store
real = time.time
time.time = lambda: real() + 400 * 86_400
_, uri, options = sys.argv
sys.exit(len(Store(uri, storage_options=json.loads(options)).gc(dry_run=False).what))
"""


def test_age_in_a_bucket_is_by_the_servers_clock(
    s3_store: Store, s3_options: dict[str, Any]
) -> None:
    """No locks there: a collector whose clock is ahead must not take live work for dead."""
    with s3_store.write(**arguments()) as writer:
        for i in writer.pending(3)[:2]:
            with writer.shard(i) as shard:
                shard.write(rows(i))
        command = [sys.executable, "-c", COLLECTOR, s3_store.uri, json.dumps(s3_options)]
        assert subprocess.run(command, timeout=100).returncode == 0
        assert writer.pending(3) == [2]
        with writer.shard(2) as shard:
            shard.write(rows(2))
        writer.commit()
    assert s3_store.table("chunks").to_table().equals(expected())
