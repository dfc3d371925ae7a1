"""What happens when a writer dies, the disk is full, files are damaged, or writers race."""

import base64
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import StoreError
from prunery.storage import Store, Table, VectorIndex

from .rows import arguments, expected, rows, write

DRIVER = Path(__file__).with_name("crash_driver.py")


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is one: kills are many, and no disk is needed for them."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="prunery-test-", dir=memory if usable else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def drive(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check_after_a_kill(run: dict[str, Any], want: str) -> None:
    check_what_is_seen(run["after"], want)
    assert run["digest"] == want
    assert run["final"]["digests"] == [want]
    assert run["final"]["problems"] == []
    assert run["left"] == []


def check_what_is_seen(seen: dict[str, Any], want: str) -> None:
    """A reader sees the whole table or none, and no name without one."""
    assert seen["digests"] in ([], [want])
    assert seen["problems"] == []
    assert len(seen["names"]) <= len(seen["digests"])


def test_a_writer_killed_at_every_visible_step(fast_folder: Path) -> None:
    """And at some others; all of them with PRUNERY_CRASH_STEPS=-1."""
    others = int(os.environ.get("PRUNERY_CRASH_STEPS", "6"))
    report = drive("steps", fast_folder, 0, others)
    assert report["kills"] == len(report["runs"]) >= 22
    seen = set()
    for run in report["runs"]:
        check_after_a_kill(run, report["want"])
        assert run["repeated"] <= 1
        seen.add(len(run["after"]["digests"]))
    assert seen == {0, 1}  # kills both before and after the manifest


def test_a_writer_killed_at_random_times(fast_folder: Path) -> None:
    report = drive("random", fast_folder, 1, 3)
    assert report["kills"] >= 5
    for table in report["tables"]:
        for seen in table["seen"]:
            check_what_is_seen(seen, table["want"])
        assert table["repeats"] <= table["kills"]  # one shard at most for each kill
        check_after_a_kill(table, table["want"])


def test_writers_race_for_one_key(fast_folder: Path) -> None:
    report = drive("race", fast_folder, 3)
    for found in report["rounds"]:
        assert len(set(found["digests"])) == 1
        assert found["final"]["digests"] == found["digests"][:1]
        assert found["final"]["problems"] == []
        assert found["left"] == []


def test_readers_during_writes_see_whole_tables(fast_folder: Path) -> None:
    report = drive("reader", fast_folder, 6)
    for reads, tables in report["readers"]:
        assert reads >= tables >= 1
    assert max(tables for _, tables in report["readers"]) >= 2  # the name moved while they read


# -- full disks --------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(i: int, n: int = 4000) -> pa.Table:
    """About 1.6 MB that does not compress."""
    return rows(i, n, d=100)


def write_noise(store: Store) -> tuple[list[int], StoreError | None]:
    """Write four shards of noise; return those that were pending, and the error if any."""
    from .rows import schema

    pending: list[int] = []
    try:
        with store.write(**arguments(schema=schema(100))) as writer:
            pending = writer.pending(4)
            for i in pending:
                with writer.shard(i) as shard:
                    shard.write(noise(i))
            writer.commit()
    except StoreError as error:
        return pending, error
    return pending, None


def test_a_full_disk(tmp_path: Path) -> None:
    want = write_noise(whole := Store(tmp_path / "whole"))
    assert want == ([0, 1, 2, 3], None)
    disk = tmp_path / "disk"
    with small_disk(disk, "5m"):
        store = Store(disk / "store")
        _, error = write_noise(store)
        assert error is not None
        assert "no space is left: free some and run again" in str(error)
        assert store.tables() == []
        assert store.names() == {}
        pending, error = write_noise(store)
        assert error is not None
        assert 0 < len(pending) < 4  # finished shards are not repeated
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again, error = write_noise(store)
        assert (again, error) == (pending, None)
        digests = [s.manifest("chunks").logical_digest for s in (store, whole)]
        assert digests[0] == digests[1]
        assert store.verify() == []


def test_a_disk_full_at_the_manifest(tmp_path: Path) -> None:
    """Shards fit, then nothing does."""
    disk = tmp_path / "disk"
    with small_disk(disk, "4m"):
        store = Store(disk / "store")
        with store.write(**arguments()) as writer:
            for i in writer.pending(3):
                with writer.shard(i) as shard:
                    shard.write(rows(i))
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
            with pytest.raises(StoreError, match="no space is left"):
                writer.commit()
            assert store.tables() == []
            filler.unlink()
            writer.commit()
        assert store.table("chunks").to_table().equals(expected())
        assert store.verify() == []


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_fails_in_the_middle_of_a_part(tmp_path: Path) -> None:
    """As a full disk, without the right to mount one."""
    store = Store(tmp_path / "store")
    with file_size_limit(300_000):
        pending, error = write_noise(store)
    assert pending == [0, 1, 2, 3]
    assert error is not None
    assert "the file size limit is reached" in str(error)
    assert store.tables() == []
    assert [info.path for info in store.backend.walk("tables")] == []
    assert not [info for info in store.backend.walk("work") if "/tmp/" in info.path]
    assert write_noise(store) == ([0, 1, 2, 3], None)
    assert store.verify() == []


def test_an_index_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2000, 64)).astype("f4")
    index = VectorIndex.build(vectors, np.arange(2000), threads=1)
    store = Store(tmp_path / "store")
    with file_size_limit(100_000):
        with pytest.raises(StoreError, match=r"mend that and run again"):
            index.save_to(store, name="index")
        with pytest.raises(StoreError, match=r"expected to write an index"):
            index.save(tmp_path / "index")
    assert store.tables() == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    index.save_to(store, name="index")
    assert store.verify() == []


# -- damaged files -----------------------------------------------------------------------------


def part_path(store: Store, number: int = 1) -> Path:
    manifest = store.manifest("chunks")
    path = store.backend.local(f"tables/{manifest.key}/{manifest.parts[number]['path']}")
    assert path is not None
    return path


def test_a_truncated_part(local_store: Store) -> None:
    write(local_store)
    path = part_path(local_store)
    os.truncate(path, path.stat().st_size - 1)
    table = local_store.table("chunks")
    with pytest.raises(StoreError, match=r"part-00001-.*the file is truncated"):
        table.to_table()
    assert pa.Table.from_batches(table.shard_batches(0)).equals(rows(0))
    problems = local_store.verify("chunks")
    assert [problem.what for problem in problems] == ["bytes", "sha256"]
    path.unlink()
    with pytest.raises(StoreError, match="found no such file"):
        table.to_table()
    assert [problem.what for problem in local_store.verify()] == ["missing"]


def outcome(table: Table) -> str:
    try:
        list(table.shard_batches(1))
    except StoreError as error:
        return str(error)
    return "read"


def test_every_flipped_bit_is_noticed_on_reading(local_store: Store) -> None:
    """In headers and footer too, which Parquet's own page checksums leave out."""
    write(local_store, n=6)
    path = part_path(local_store)
    good = path.read_bytes()
    table = local_store.table("chunks")
    want = table.to_table()
    found = {}
    for at in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        found[at] = outcome(table)
    # the magic number at the start is the only thing that no reader interprets
    assert [at for at, text in found.items() if text == "read"] == [0, 3]
    assert all("damaged after it was written" in found[at] for at in found if at > 3)
    path.write_bytes(good)
    assert table.to_table().equals(want)


def test_damage_in_columns_that_are_not_read_is_left_to_verify(local_store: Store) -> None:
    write(local_store)
    path = part_path(local_store, 0)
    part = local_store.manifest("chunks").parts[0]
    raw = bytearray(path.read_bytes())
    raw[part["footer"] - 20] ^= 1  # in the vectors, the last column
    path.write_bytes(raw)
    table = local_store.table("chunks")
    assert table.to_table(["id", "text"]).num_rows == 30
    with pytest.raises(StoreError, match="CRC-32"):
        table.to_table(["vector"])
    assert [problem.what for problem in local_store.verify()] == ["sha256"]
    assert len(base64.b64decode(part["checksums"])) == 4 * (1 + 6)


def test_a_damaged_shard_is_written_again_on_resuming(local_store: Store) -> None:
    def two_shards() -> str:
        with local_store.write(**arguments()) as writer:
            for i in writer.pending(3):
                if i == 2:
                    continue
                with writer.shard(i) as shard:
                    shard.write(rows(i))
            return writer.key

    for damage in ("truncate", "flip", "delete"):
        key = two_shards()
        folder = local_store.backend.local(f"tables/{key}")
        assert folder is not None
        path = next(folder.glob("part-00001-*"))
        if damage == "truncate":
            os.truncate(path, 100)
        elif damage == "flip":
            raw = bytearray(path.read_bytes())
            raw[200] ^= 16
            path.write_bytes(raw)
        else:
            path.unlink()
        with local_store.write(**arguments()) as writer:
            assert writer.pending(3) == [1, 2]
    write(local_store)
    assert local_store.table("chunks").to_table().equals(expected())
    assert local_store.verify() == []


def test_a_manifest_that_contradicts_its_parts(local_store: Store) -> None:
    """Altered together with its own digest, as no accident would."""
    from prunery.storage.manifest import Manifest

    manifest = write(local_store)
    path = f"tables/{manifest.key}/manifest.json"

    def altered(**changes: Any) -> None:
        body = {**json.loads(json.dumps(manifest.to_dict())), **changes}
        local_store.backend.replace(path, Manifest(**body).to_bytes())

    part = {**manifest.parts[0]}
    altered(parts=[{**part, "rows": 9}, *manifest.parts[1:]])
    with pytest.raises(StoreError, match="expected 9 rows as the manifest lists, found 10"):
        local_store.table("chunks").to_table()
    altered(seed=1)
    assert "key" in {problem.what for problem in local_store.verify()}
    altered(logical_digest="0" * 64)
    assert {problem.what for problem in local_store.verify()} == {"logical digest"}
    altered(parts=[{**part, "logical_digest": "0" * 32}, *manifest.parts[1:]])
    assert {problem.what for problem in local_store.verify()} == {"logical digest"}
    altered(rows=31)
    assert {problem.what for problem in local_store.verify()} == {"rows"}
