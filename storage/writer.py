"""Writing a table: shards into a journal, then the manifest, last."""

import datetime
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from .._version import __version__
from ..errors import InputError, StoreError
from . import layout, schemas
from .environment import libraries
from .ids import canonical_json, file_digest
from .journal import Journal, total
from .locks import FileLock, held
from .manifest import Attachment, Kind, Manifest
from .parquet import PartReader
from .rowhash import RowHash, table_digest
from .shard import Entry, ShardWriter, disk_errors

if TYPE_CHECKING:
    from .store import Store

# A writer on an object store, where no lock shows that it lives, says so this often.
_HEARTBEAT_SECONDS = 600


class TableWriter:
    """Writes one table under its content key. Made by `Store.write`; a context manager.

    Shards may be written in any order, by several threads or processes that each open a
    writer with the same arguments; two that write the same shard are settled by the journal
    (the first counts, the second must have the same rows). Leaving without `commit` keeps the
    finished shards, and the next writer of this key goes on from there.

    Attributes:
        key: the content key.
        committed: the table was complete when this writer opened: there is nothing to do but
            `commit`, which points the name to it.
    """

    def __init__(
        self,
        store: "Store",
        *,
        name: str,
        kind: Kind,
        step: str,
        version: int,
        options: Mapping[str, Any],
        inputs: Sequence[str],
        models: Mapping[str, str],
        seed: int,
        schema: pa.Schema,
    ) -> None:
        self.name = name
        self.kind = kind
        self.step = step
        self.version = version
        self.options = dict(options)
        self.inputs = list(inputs)
        self.models = dict(models)
        self.seed = seed
        self.schema = schema
        self.key = store.key(
            step=step, version=version, options=options, inputs=inputs, models=models, seed=seed
        )
        self.committed = False
        self._store = store
        self._backend = store.backend
        self._shards: int | None = None
        self._journal = Journal(store.backend, self.key, name)
        self._attachments: dict[str, Attachment] = {}
        self._locks: list[FileLock] = []
        self._started = self._beat = 0.0

    # -- opening and closing -------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        with disk_errors(f"table {self.name!r}"):
            self._register()
        return self

    def _register(self) -> None:
        """Become visible to garbage collection, then see what is there."""
        with held(self._backend.lock(layout.GC_LOCK)):
            try:
                self._take_locks()
                for parent in self.inputs:
                    if not self._store.exists(parent):
                        raise StoreError(
                            f"table {self.name!r}: expected every input to be a committed table "
                            f"of {self._backend.uri}, found no table {parent}; run the step that "
                            "makes it first (digests of source files belong into `options`)"
                        )
                self.committed = self._store.exists(self.key)
                if not self.committed:
                    self._announce()
            except BaseException:
                self._release()
                raise

    def _take_locks(self) -> None:
        """Hold this table and its inputs shared while the writer lives."""
        own = self._backend.lock(layout.lock(self.key))
        if own is None:
            return
        self._locks.append(own)
        if own.try_exclusive():  # nobody else: what lies in tmp was left by the dead
            self._backend.remove_tree(f"{layout.work(self.key)}/tmp")
        own.shared()
        for parent in dict.fromkeys(self.inputs):
            lock = self._backend.lock(layout.lock(parent))
            if lock is not None:
                self._locks.append(lock)
                lock.shared()

    def _announce(self) -> None:
        intent = {"name": self.name, "step": self.step, "version": self.version,
                  "options": self.options, "inputs": self.inputs, "models": self.models,
                  "seed": self.seed, "prunery": __version__}  # fmt: skip
        self._backend.replace(f"{layout.work(self.key)}/intent.json", canonical_json(intent))
        self._beat = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        for lock in self._locks:
            lock.release(unlink=lock.try_exclusive())
        self._locks.clear()

    # -- shards --------------------------------------------------------------------------------

    def pending(self, n_shards: int) -> list[int]:
        """Fix the number of shards and return those that are not in the journal yet.

        Shards of an earlier attempt count only if their files still have the bytes that the
        journal says (re-hashed where files are local, their length elsewhere).

        Raises:
            InputError: `n_shards` is no count.
            StoreError: another writer is at work on this key with another number of shards.
        """
        if isinstance(n_shards, bool) or not isinstance(n_shards, int) or n_shards < 0:
            raise InputError(f"expected a number of shards of at least 0, found {n_shards!r}")
        with disk_errors(f"table {self.name!r}"):
            if not self.committed:
                with held(self._backend.lock(layout.GC_LOCK)):
                    self._plan(n_shards)
            if self.committed:
                return []
            done = self._journal.read()
        self._shards = n_shards
        return [i for i in range(n_shards) if i not in done]

    def _plan(self, n_shards: int) -> None:
        path = f"{layout.work(self.key)}/plan.json"
        plan = canonical_json({"shards": n_shards})
        if self._backend.create(path, plan):
            return
        found = self._backend.read(path)
        if found == plan:
            return
        own = self._locks[0] if self._locks else None
        if own is None or not own.try_exclusive():
            raise StoreError(
                f"table {self.name!r}: expected a cut into {n_shards} shards, found unfinished "
                f"work on the same key in {json.loads(found)['shards']}; use that number, let "
                f"the other writer finish, or drop what it left with Store.remove({self.key!r})"
            )
        # The only writer now. What was cut otherwise cannot be used, unless it was finished.
        self.committed = self._store.exists(self.key)
        if not self.committed:
            self._backend.remove_tree(f"{layout.work(self.key)}/journal")
            self._backend.remove_tree(layout.table(self.key))
            self._backend.replace(path, plan)
        own.shared()

    def shard(self, i: int) -> ShardWriter:
        """Return the writer of shard `i`, to be used as a context manager.

        Raises:
            InputError: no shard of that number in the plan.
            StoreError: the table is committed already.
        """
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise InputError(f"expected a shard number of at least 0, found {i!r}")
        if self._shards is not None and i >= self._shards:
            raise InputError(f"expected a shard below {self._shards} as planned, found {i}")
        if self.committed:
            raise StoreError(
                f"table {self.name!r} ({self.key[:12]}) is committed and cannot change; "
                "check `writer.committed` first, and raise the step's version where it "
                "computes something else now"
            )
        if time.monotonic() - self._beat > _HEARTBEAT_SECONDS:
            with disk_errors(f"table {self.name!r}"):
                self._announce()
        return ShardWriter(self, i)

    def scratch(self, label: str) -> Path:
        """Make a fresh local folder for unfinished files; whoever asked removes it."""
        return self._backend.scratch(f"{layout.work(self.key)}/tmp/{label}")

    def footer(self, shard: int) -> dict[str, str]:
        """Key-value metadata for a part's Parquet footer."""
        return {
            "key": self.key,
            "step": self.step,
            "schema_version": str(self.version),
            "shard": str(shard),
            "version": __version__,
        }

    def place(self, local: Path, name: str) -> None:
        """Move a finished part into the table's folder, where nobody sees it yet."""
        self._backend.place(local, f"{layout.table(self.key)}/{name}")

    def record(self, entry: Entry) -> None:
        """Enter a finished shard into the journal."""
        self._journal.record(entry)

    def tally(self) -> tuple[int, int]:
        """Return how many rows the finished shards reject and hold, whichever run made them.

        For a step that must not commit when too many rows were bad.
        """
        entries = self._journal.read().values()
        rejected = sum(entry["rejects"]["rows"] for entry in entries if entry["rejects"])
        return rejected, sum(entry["part"]["rows"] for entry in entries)

    def reject_reasons(self, most: int) -> list[str]:
        """Return why the first rows were rejected, `most` of them at most, before the commit."""
        found: list[str] = []
        for entry in self._journal.read().values():
            if entry["rejects"] and len(found) < most:
                reader = PartReader(self._backend, layout.table(self.key), entry["rejects"])
                for batch in reader.batches(["reason"], None):
                    found += batch.column("reason").to_pylist()[: most - len(found)]
        return found

    # -- attachments and commit ----------------------------------------------------------------

    def attach(
        self, name: str, content: str | os.PathLike[str] | bytes, *, move: bool = False
    ) -> None:
        """List a file beside the rows: bytes, or the path of a local file, which is copied.

        With `move` the file itself goes, which spares a copy of a large index. Where the table
        is committed already, what it lists stays as it is.

        Raises:
            InputError: a name that cannot be a file name, or was used before.
            StoreError: the file cannot be read or stored.
        """
        layout.check_name(name, "an attachment name")
        if name in self._attachments:
            raise InputError(f"expected a new attachment name, found {name!r} a second time")
        if self.committed:
            return
        with disk_errors(f"attachment {name!r}"):
            folder = self.scratch(uuid.uuid4().hex)
            try:
                self._attachments[name] = self._attach(name, content, folder / "content", move)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _attach(
        self, name: str, content: str | os.PathLike[str] | bytes, copy: Path, move: bool
    ) -> Attachment:
        if isinstance(content, bytes):
            copy.write_bytes(content)
        elif move:
            shutil.move(content, copy)
        else:
            shutil.copyfile(content, copy)
        sha256, size = file_digest(copy), copy.stat().st_size
        path = layout.attachment(name, sha256)
        self.place(copy, path)
        return Attachment(name=name, path=path, bytes=size, sha256=sha256)

    def commit(self, *, notes: Mapping[str, Any] | None = None) -> Manifest:
        """Write the manifest, which makes the table exist, and point the name to it.

        Where another writer of this key was first, its manifest is the answer.

        Raises:
            StoreError: shards are missing, the disk is full, or the other writer has other
                rows (then the name stays where it was).
        """
        with disk_errors(f"manifest of {self.name!r}"):
            manifest = self._existing() if self.committed else self._commit(dict(notes or {}))
            self._store.point(self.name, self.key)
            self._clean(manifest)
        self.committed = True
        return manifest

    def _existing(self) -> Manifest:
        return self._store.manifest(self.key)

    def _commit(self, notes: dict[str, Any]) -> Manifest:
        if self._store.exists(self.key):
            return self._yield_to(self._existing())
        entries = self._complete(self._journal.read())
        manifest = self._manifest(entries, notes)
        if self._backend.create(layout.manifest(self.key), manifest.to_bytes()):
            return manifest
        return self._yield_to(self._existing())

    def _complete(self, entries: dict[int, Entry]) -> list[Entry]:
        shards = self._shards
        if shards is None:
            shards = max(entries, default=-1) + 1
        missing = [i for i in range(shards) if i not in entries]
        if missing:
            raise StoreError(
                f"table {self.name!r}: expected {shards} finished shards, found "
                f"{len(missing)} missing: {_some(missing)}; write them, then commit"
            )
        surplus = [i for i in entries if i >= shards]
        if surplus:
            raise StoreError(
                f"table {self.name!r}: expected {shards} shards as planned, found also "
                f"{_some(surplus)}"
            )
        return list(entries.values())

    def _yield_to(self, winner: Manifest) -> Manifest:
        """Use the manifest of the writer that was first, if it has the rows we have."""
        if self._shards is None or self._shards == len(winner.parts):
            self._journal.compare(winner)
        return winner

    def _manifest(self, entries: list[Entry], notes: dict[str, Any]) -> Manifest:
        parts = [entry["part"] for entry in entries]
        rejects = [entry["rejects"] for entry in entries if entry["rejects"]]
        hashes = [RowHash.parse(part["rows"], part["logical_digest"]) for part in parts]
        return Manifest(
            name=self.name,
            kind=self.kind,
            step=self.step,
            version=self.version,
            key=self.key,
            options=json.loads(canonical_json(self.options)),
            parents=self.inputs,
            models=self.models,
            seed=self.seed,
            schema=schemas.describe(self.schema),
            arrow_schema=schemas.to_text(self.schema),
            parts=parts,
            rejects=rejects,
            attachments=[self._attachments[name] for name in sorted(self._attachments)],
            rows=sum(part["rows"] for part in parts),
            logical_digest=table_digest(self.schema, hashes),
            kept=sum(entry["kept"] for entry in entries),
            dropped=total(entry["dropped"] for entry in entries),
            rejected=sum(part["rows"] for part in rejects),
            libraries=libraries(),
            seconds=round(time.perf_counter() - self._started, 6),
            shard_seconds=round(sum(entry["seconds"] for entry in entries), 6),
            peak_memory_bytes=max((e["peak_memory_bytes"] for e in entries), default=0),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            prunery=__version__,
            notes=json.loads(canonical_json(notes)),
        )

    def _clean(self, manifest: Manifest) -> None:
        """Remove what the commit made superfluous; garbage collection finds what is left."""
        listed = {item["path"] for item in manifest.files()}
        self._journal.remove_others(listed)
        for item in self._attachments.values():
            if item["path"] not in listed:
                self._backend.remove(f"{layout.table(self.key)}/{item['path']}")
        own = self._locks[0] if self._locks else None
        if own is None or own.try_exclusive():
            self._backend.remove_tree(layout.work(self.key))
            if own is not None:
                own.shared()


def _some(numbers: Sequence[int], most: int = 10) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
