"""Run as a script: forks writers, kills them with SIGKILL, and says what was left behind.

It stays single-threaded (everything that touches Arrow happens in a forked child), so that
forking is safe and one kill costs milliseconds. Prints one JSON object.

    crash_driver.py steps FOLDER SEED N    kill before and after every step that makes something
                                           visible, and at N others (-1: all of them)
    crash_driver.py random FOLDER SEED N   kill after random times, until N tables are written
    crash_driver.py race FOLDER ROUNDS     several writers of one key at the same time
    crash_driver.py reader FOLDER TABLES   readers while a name moves from table to table
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # imported before forking, used only after
import rows as data

from prunery.storage import Store

SHARDS = 3


def forked(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, Any]:
    """Run in a child; return its exit status (negative: the signal) and what it returned."""
    child = start(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child[0], signal.SIGKILL)
    return finish(child)


def start(work: Callable[[], Any]) -> tuple[int, int]:
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        os.close(out)
        pa.set_cpu_count(1)
        answer = {"value": work()}
    except BaseException:  # noqa: BLE001 the parent raises it
        answer = {"error": traceback.format_exc()}
    os.write(into, json.dumps(answer).encode())
    os._exit(1 if "error" in answer else 0)


def finish(child: tuple[int, int]) -> tuple[int, Any]:
    pid, out = child
    with open(out, "rb") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer = json.loads(text) if text else {}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return status, answer.get("value")


def write(folder: Path, salt: str = "", log: Path | None = None, slow: float = 0.0) -> str:
    """Write the table, noting every shard that is begun; return its logical digest."""
    store = Store(folder)
    with store.write(**data.arguments(options={"salt": salt})) as writer:
        for i in writer.pending(SHARDS):
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{i}\n")
            with writer.shard(i) as shard:
                for piece in range(3):
                    shard.write(data.rows(i * 3 + piece, 50, salt))
                    time.sleep(slow)
                shard.reject({"shard": i}, "for the test")
        if not writer.committed:
            writer.attach("report.txt", b"report")
        return writer.commit().logical_digest


def look(folder: Path) -> dict[str, Any]:
    """What a reader sees: complete tables or nothing, and no name without its table."""
    store = Store(folder)
    tables = store.tables()
    for manifest in tables:
        read = store.table(manifest.key)
        if read.to_table().num_rows != manifest.rows or read.rejects().num_rows != SHARDS:
            raise RuntimeError(f"a table of {manifest.rows} rows reads otherwise")
        read.attachment("report.txt").read_bytes()
    return {
        "digests": [manifest.logical_digest for manifest in tables],
        "rows": [manifest.rows for manifest in tables],
        "names": store.names(),
        "problems": [str(problem) for problem in store.verify()],
    }


def started(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


# -- chosen steps ------------------------------------------------------------------------------

VISIBLE = ("link", "replace")
OTHERS = ("fsync", "unlink", "mkdir", "rmdir")


def watched(work: Callable[[], Any], die_at: int = -1) -> Callable[[], list[str]]:
    """The same work, killed at the n-th step (even before it, odd after); returns the steps."""
    steps: list[str] = []

    def check(name: str) -> None:
        if len(steps) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(name)

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            check(name)
            out = real(*args, **kwargs)
            check(name)
            return out

        return step

    def run() -> list[str]:
        for name in (*VISIBLE, *OTHERS):
            setattr(os, name, wrap(name, getattr(os, name)))
        work()
        return steps

    return run


def at_steps(folder: Path, seed: int, others: int) -> dict[str, Any]:
    want = forked(lambda: write(folder / "undisturbed"))[1]
    steps = forked(watched(lambda: write(folder / "counted")))[1]
    rest = [n for n, name in enumerate(steps) if name not in VISIBLE]
    chosen = {n for n, name in enumerate(steps) if name in VISIBLE}
    chosen |= set(rest if others < 0 else random.Random(seed).sample(rest, others))
    report: dict[str, Any] = {"want": want, "kills": 0, "runs": []}
    for n in sorted(chosen):
        store, log = folder / f"s{n}", folder / f"s{n}.log"
        status, _ = forked(watched(lambda s=store, g=log: write(s, log=g), n))
        report["kills"] += status == -signal.SIGKILL
        report["runs"].append(forked(lambda s=store, g=log: aftermath(s, g))[1])
    return report


def aftermath(store: Path, log: Path) -> dict[str, Any]:
    """What a reader sees after the kill, and after the rerun; how many shards were repeated."""
    after = look(store)
    before = started(log)
    digest = write(store, log=log)
    again = started(log)[len(before) :]
    return {
        "after": after,
        "repeated": len(set(before) & set(again)),
        "digest": digest,
        "final": look(store),
        "left": leftovers(store),
    }


def leftovers(folder: Path) -> list[str]:
    """Files that belong to nothing, once garbage is collected."""
    store = Store(folder)
    store.gc(dry_run=False, older_than_seconds=0)
    listed = {"work/gc.lock", "work/names.lock", "names/chunks.json"}
    for manifest in store.tables():
        listed.add(f"tables/{manifest.key}/manifest.json")
        listed |= {f"tables/{manifest.key}/{item['path']}" for item in manifest.files()}
    return [info.path for info in store.backend.walk("") if info.path not in listed]


# -- random times ------------------------------------------------------------------------------


def at_random(folder: Path, seed: int, tables: int) -> dict[str, Any]:
    rng = random.Random(seed)
    report: dict[str, Any] = {"kills": 0, "tables": []}
    # the time of an undisturbed write, so that kills fall all over it on any machine
    begun = time.monotonic()
    want = forked(lambda: write(folder / "undisturbed", slow=0.002))[1]
    span = time.monotonic() - begun
    for t in range(tables):
        store, log = folder / f"store-{t}", folder / f"{t}.log"
        kills = 0
        seen = []
        while kills < 12:
            work = lambda st=store, g=log: write(st, log=g, slow=0.002)  # noqa: E731
            status, _ = forked(work, kill_after=rng.uniform(0.2, 0.9) * span)
            if status == 0:
                break
            kills += 1
            seen.append(forked(lambda st=store: look(st))[1])
        repeats = max(0, len(started(log)) - SHARDS)
        done = forked(lambda st=store, g=log: aftermath(st, g))[1]
        report["kills"] += kills
        report["tables"].append(
            {"want": want, "kills": kills, "repeats": repeats, "seen": seen, **done}
        )
    return report


# -- races -------------------------------------------------------------------------------------


def race(folder: Path, rounds: int) -> dict[str, Any]:
    out = []
    for r in range(rounds):
        store = folder / f"race-{r}"
        children = [start(lambda s=store: write(s, slow=0.001)) for _ in range(3)]
        digests = [finish(child)[1] for child in children]
        final, left = forked(lambda s=store: (look(s), leftovers(s)))[1]
        out.append({"digests": digests, "final": final, "left": left})
    return {"rounds": out}


def reader(folder: Path, tables: int) -> dict[str, Any]:
    """One child points a name to ever new tables; others read it all the while."""
    store, done = folder / "store", folder / "done"

    def keep_writing() -> None:
        try:
            for n in range(tables):
                write(store, salt=str(n), slow=0.002)
        finally:
            done.touch()

    def keep_reading() -> list[int]:
        reads, seen = 0, set()
        while not done.exists():
            found = Store(store)
            if "chunks" not in found.names():
                continue
            table = found.table("chunks")
            salt = table.manifest.options["salt"]
            texts = table.to_table(["text"])["text"].drop_null().to_pylist()
            whole = all(text.startswith(f"{salt}text ") for text in texts)
            if table.num_rows != SHARDS * 150 or not whole:
                raise RuntimeError(f"a mixed table: {table!r}")
            reads += 1
            seen.add(salt)
        return [reads, len(seen)]

    children = [start(keep_writing), start(keep_reading), start(keep_reading)]
    results = [finish(child)[1] for child in children]
    return {"readers": results[1:]}


def main() -> None:
    mode, folder, *rest = sys.argv[1:]
    report = {
        "steps": lambda: at_steps(Path(folder), int(rest[0]), int(rest[1])),
        "random": lambda: at_random(Path(folder), int(rest[0]), int(rest[1])),
        "race": lambda: race(Path(folder), int(rest[0])),
        "reader": lambda: reader(Path(folder), int(rest[0])),
    }[mode]()
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
