"""Every answer of a black box, kept for good in one SQLite file, so that none is asked twice.

The file stands under the cache (`PRUNERY_CACHE`, else `~/.cache/prunery`) and is named by what
decides an answer. Prompts and rows are kept as 128-bit digests, never as text. Several processes
may write to one file: the first answer for a (prompt, row) stays.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import StoreError
from ...storage.ids import digest
from .asking import Answer
from .task import PromptTaskOptions

#: Goes up when answers of the same box come to mean something else.
_ANSWERS_VERSION = 1
#: "Pans", in the header of the file: tells it from other programs' databases.
_APPLICATION = 0x50616E73
_LAYOUT = 1
_WAIT_SECONDS = 60.0
# Connections that came over a fork: closing one here could disturb its owner.
_INHERITED: list[sqlite3.Connection | None] = []
# A statement takes at most 32766 values.
_CHUNK = 16_000
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    prompt BLOB NOT NULL, row BLOB NOT NULL, value BLOB NOT NULL,
    read INTEGER NOT NULL, written INTEGER NOT NULL, checked INTEGER NOT NULL,
    PRIMARY KEY (prompt, row)
) WITHOUT ROWID
"""
# What decides an answer, by the kind of box; `model` and its digests do for all.
_DECIDES: dict[str, tuple[str, ...]] = {
    "encoder": ("label_template", "temperature"),
    "causal": ("dtype", "verbaliser_tokens"),
    "masked": ("dtype", "verbaliser_tokens"),
    "seq2seq": ("dtype", "verbaliser_tokens"),
    "endpoint": ("protocol", "top_logprobs"),
}


def log_path(options: PromptTaskOptions, words: Sequence[str], digests: Mapping[str, str]) -> Path:
    """The file for the answers of a task's black box: of all tasks that ask the same.

    `words` stand for the classes, in order; `digests` are the models' by role. Shots, seeds and
    prompts written by hand do not enter: another draw of rows uses the same file.
    """
    same = {
        "answers": _ANSWERS_VERSION,
        "black_box": options.black_box,
        # where a model lies is nothing to its answers; behind an endpoint its name is all there is
        "model": None if digests else options.model,
        "digests": dict(digests),
        "base_url": options.base_url and options.base_url.rstrip("/"),
        "template": options.templates()[0].source,
        "words": list(words),
        **{name: getattr(options, name) for name in _DECIDES[options.black_box]},
    }
    home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
    return Path(home, "answers", f"{digest(same)[:32]}.sqlite")


class SqliteLog:
    """Answers by (prompt, row) in one file; see `asking.AnswerLog`.

    The file is made when first needed. Writes are durable (WAL, synchronous=FULL) when `keep`
    returns. Threads take turns; a process made by fork opens the file anew.

    Raises
    ------
    StoreError
        From `find` and `keep`: the file is damaged or another program's, it cannot be written,
        or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None
        self._process = 0

    def find(self, prompts: Sequence[str], rows: Sequence[str]) -> list[list[Answer | None]]:
        """What is known of each (prompt, row): P lists of N, None where nothing is.

        A log probability array is (C,) float32 and read-only.
        """
        made: list[list[Answer | None]] = [[None] * len(rows) for _ in prompts]
        if not prompts or not rows or not self.path.exists():
            return made
        at_prompt, at_row = _places(prompts), _places(rows)
        with self._connection() as connection:
            for some in _chunks(list(at_prompt)):
                for others in _chunks(list(at_row)):
                    for prompt, row, answer in self._select(connection, some, others):
                        for p in at_prompt[prompt]:
                            for n in at_row[row]:
                                made[p][n] = answer
        return made

    def keep(self, pairs: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> None:
        """Write answers down; those whose (prompt, row) has one already are left out."""
        lines = []
        for (prompt, row), (value, read, written) in zip(pairs, answers, strict=True):
            blob = np.ascontiguousarray(value, "<f4").tobytes()
            keys = _key(prompt), _key(row)
            lines.append((*keys, blob, read, written, _check(*keys, blob, read, written)))
        if not lines:
            return
        with self._connection() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", lines)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _select(
        self, connection: sqlite3.Connection, prompts: list[bytes], rows: list[bytes]
    ) -> Iterator[tuple[bytes, bytes, Answer]]:
        found = connection.execute(
            "SELECT prompt, row, value, read, written, checked FROM answers"
            f" WHERE prompt IN ({_marks(prompts)}) AND row IN ({_marks(rows)})",
            [*prompts, *rows],
        )
        for prompt, row, value, read, written, checked in found:
            try:
                sound = _check(prompt, row, value, read, written) == checked
            except (TypeError, struct.error):  # not even of the column's type
                sound = False
            if not sound:
                raise sqlite3.DatabaseError("an answer does not match its checksum")
            yield prompt, row, (np.frombuffer(value, "<f4"), read, written)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The open file, for one thread at a time; SQLite's errors in our words."""
        with self._lock:
            try:
                if self._opened is None or self._process != os.getpid():
                    _INHERITED.append(self._opened)
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._opened, self._process = _open(self.path), os.getpid()
                yield self._opened
            except (sqlite3.Error, OSError) as error:
                raise StoreError(_advice(self.path, error)) from error


def _open(path: Path) -> sqlite3.Connection:
    # Autocommit: a transaction begins where this module says so.
    connection = sqlite3.connect(
        path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the table in an empty file; refuse a file of another program or layout."""
    marks = _header(connection)
    if marks != (_APPLICATION, _LAYOUT):
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            marks = _header(connection)  # another process may have been first
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if marks == (0, 0) and not tables:
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_LAYOUT}")
                connection.execute(_TABLE)
            elif marks != (_APPLICATION, _LAYOUT):
                raise sqlite3.DatabaseError(f"its marks are {marks[0]:#x} and {marks[1]}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("SELECT prompt, row, value, read, written, checked FROM answers LIMIT 0")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    return application, layout


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log: SQLite does not wait by itself for others doing the same."""
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _advice(path: Path, error: Exception) -> str:
    said = str(error)
    if "full" in said or "No space" in said:
        return f"no space left for the log of answers {path} ({said}). Make room and run again."
    if "locked" in said:
        return (
            f"another process held the log of answers {path} for over {_WAIT_SECONDS:.0f} s"
            f" ({said}). End it, or run again later."
        )
    if isinstance(error, OSError) or any(
        sign in said for sign in ("unable to open", "readonly", "disk I/O")
    ):
        return (
            f"cannot open or write the log of answers {path} ({said}). Expected a folder that"
            " can be written to; set PRUNERY_CACHE to one, or `remember: false`."
        )
    return (
        f"{path} is damaged or no log of answers ({said}). Move it away and run again; what it"
        " held will be asked anew."
    )


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _check(prompt: bytes, row: bytes, value: bytes, read: int, written: int) -> int:
    return zlib.crc32(prompt + row + value + struct.pack("<qq", read, written))


def _places(texts: Sequence[str]) -> dict[bytes, list[int]]:
    made: dict[bytes, list[int]] = {}
    for place, text in enumerate(texts):
        made.setdefault(_key(text), []).append(place)
    return made


def _chunks(keys: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(keys), _CHUNK):
        yield keys[at : at + _CHUNK]


def _marks(values: list[bytes]) -> str:
    return ",".join("?" * len(values))
