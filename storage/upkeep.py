"""Lineage, verification and garbage collection."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import InputError, StoreError
from . import layout
from .backend import Backend, FileInfo
from .locks import FileLock, held
from .manifest import Attachment, Manifest, Part, key_of
from .parquet import PartReader
from .rowhash import RowHash, table_digest
from .shard import disk_errors

if TYPE_CHECKING:
    from .store import Store

_CHUNK = 1 << 20


# -- lineage ----------------------------------------------------------------------------------


def lineage(store: "Store", ref: str) -> list[Manifest]:
    """Return a table and all its ancestors, each once, every parent before its children.

    Raises:
        StoreError: an ancestor is missing.
    """
    done: dict[str, Manifest] = {}
    stack = [(store.resolve(ref), False)]
    while stack:
        key, parents_done = stack.pop()
        if key in done:
            continue
        manifest = store.manifest(key)
        if parents_done:
            done[key] = manifest
            continue
        stack.append((key, True))
        for parent in reversed(manifest.parents):
            if not store.exists(parent):
                raise StoreError(
                    f"table {manifest.name!r} ({key[:12]}): expected its input {parent} in "
                    f"{store.uri}, found none; run the step that makes it again"
                )
            stack.append((parent, False))
    return list(done.values())


# -- verification -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as a manifest lists it.

    Attributes:
        key: the table's key; empty where a name is wrong.
        name: the table's name, as far as known.
        path: the file, relative to the store.
        what: what was compared: `manifest`, `key`, `parent`, `missing`, `bytes`, `sha256`,
            `rows`, `logical digest` or `name`.
        expected, found: both values.
    """

    key: str
    name: str
    path: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        table = f"{self.name} ({self.key[:12]})" if self.key else self.name
        return (
            f"{table}: {self.path}: {self.what}: expected {self.expected}, found {self.found}; "
            "remove the table and run its step again"
        )


def verify(store: "Store", ref: str | None) -> list[Problem]:
    """Re-hash what a manifest lists; without `ref`, all of them, and look at every name."""
    if ref is not None:
        return list(_verify_table(store, store.resolve(ref)))
    problems: list[Problem] = []
    for key in store.backend.folders(layout.TABLES):
        if store.exists(key):
            problems.extend(_verify_table(store, key))
    for name, key in store.names().items():
        if not store.exists(key):
            problems.append(
                Problem("", name, layout.name(name), "name", f"a committed table {key}", "none")
            )
    return problems


def _verify_table(store: "Store", key: str) -> Iterator[Problem]:
    path = layout.manifest(key)
    try:
        manifest = store.manifest(key)
    except StoreError as error:
        yield Problem(key, "?", path, "manifest", "a sound manifest", str(error))
        return
    check = _Check(store.backend, manifest)
    yield from check.manifest(store)
    for item in manifest.attachments:
        yield from check.bytes(item)
    for part in manifest.rejects:
        yield from check.part(part)
    hashes = []
    for part in manifest.parts:
        yield from check.part(part)
        hashes.append(RowHash.parse(part["rows"], part["logical_digest"]))
    total = table_digest(manifest.pa_schema(), hashes)
    yield from check.equal(path, "logical digest", manifest.logical_digest, total)
    rows = sum(part["rows"] for part in manifest.parts)
    yield from check.equal(path, "rows", manifest.rows, rows)


class _Check:
    """Compares the files of one table with its manifest."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._folder = layout.table(manifest.key)

    def equal(self, path: str, what: str, expected: object, found: object) -> Iterator[Problem]:
        if expected != found:
            manifest = self._manifest
            yield Problem(manifest.key, manifest.name, path, what, str(expected), str(found))

    def manifest(self, store: "Store") -> Iterator[Problem]:
        m = self._manifest
        path = layout.manifest(m.key)
        key = key_of(step=m.step, version=m.version, options=m.options, inputs=m.parents,
                     models=m.models, seed=m.seed)  # fmt: skip
        yield from self.equal(path, "key", m.key, key)
        for parent in m.parents:
            if not store.exists(parent):
                yield from self.equal(path, "parent", f"a committed table {parent}", "none")

    def bytes(self, item: Part | Attachment) -> Iterator[Problem]:
        path = f"{self._folder}/{item['path']}"
        info = self._backend.stat(path)
        if info is None:
            yield from self.equal(path, "missing", f"{item['bytes']} bytes", "no such file")
            return
        yield from self.equal(path, "bytes", item["bytes"], info.size)
        yield from self.equal(path, "sha256", item["sha256"], self._sha256(path))

    def part(self, part: Part) -> Iterator[Problem]:
        problems = list(self.bytes(part))
        yield from problems
        if problems:  # its rows cannot be trusted either
            return
        path = f"{self._folder}/{part['path']}"
        rowhash = RowHash()
        try:
            for batch in PartReader(self._backend, self._folder, part).batches():
                rowhash.update(batch)
        except StoreError as error:
            yield from self.equal(path, "rows", "readable rows", str(error))
            return
        yield from self.equal(path, "rows", part["rows"], rowhash.rows)
        yield from self.equal(path, "logical digest", part["logical_digest"], rowhash.text)

    def _sha256(self, path: str) -> str:
        sha = hashlib.sha256()
        with self._backend.open(path) as source:
            while chunk := source.read(_CHUNK):
                sha.update(chunk)
        return sha.hexdigest()


# -- garbage collection -----------------------------------------------------------------------

What = Literal["table", "unfinished", "work", "orphan", "temporary"]


@dataclass(frozen=True, slots=True)
class GcItem:
    """Something that was, or would be, removed: a path in the store, what it is, its bytes."""

    path: str
    what: What
    bytes: int


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a garbage collection removed, or would remove (`dry_run`), and its bytes."""

    what: tuple[GcItem, ...]
    bytes: int
    dry_run: bool


def collect(
    store: "Store", *, dry_run: bool, older_than_seconds: float, keep_history: int
) -> GcReport:
    """Remove what nothing needs and nobody touched for `older_than_seconds`.

    Kept: tables that a name points to or pointed to (the last `keep_history` keys besides the
    present one), their ancestors, tables younger than the limit with theirs, and everything
    that a live writer makes or reads. In a folder a writer lives as long as it holds its lock,
    and no other writer starts while a collection runs; on an object store there are no locks,
    and a writer that finished no shard for `older_than_seconds` counts as dead.

    Removed: other tables (manifest first, so that nobody sees half a table), unfinished work
    of dead writers, files in a table's folder that its manifest does not list, temporary files.

    Raises:
        InputError: a negative limit.
        StoreError: a manifest is damaged, so that its ancestors are unknown.
    """
    if older_than_seconds < 0 or keep_history < 0:
        raise InputError(
            "expected older_than_seconds and keep_history of at least 0, found "
            f"{older_than_seconds} and {keep_history}"
        )
    with (
        disk_errors("garbage collection"),
        held(None if dry_run else store.backend.lock(layout.GC_LOCK), exclusive=True),
    ):
        sweep = _Sweep(store, dry_run, store.backend.now() - older_than_seconds, keep_history)
        sweep.run()
    items = tuple(sweep.items)
    return GcReport(items, sum(item.bytes for item in items), dry_run)


class _Sweep:
    """One garbage collection."""

    def __init__(self, store: "Store", dry_run: bool, before: float, keep_history: int) -> None:
        self._store = store
        self._backend = store.backend
        self._dry_run = dry_run
        self._before = before
        self._keep_history = keep_history
        self.items: list[GcItem] = []

    def run(self) -> None:
        tables, work = _by_key(self._backend, layout.TABLES), _by_key(self._backend, layout.WORK)
        busy = self._busy(work)
        kept = self._reached(self._roots(tables, work, busy))
        for key in sorted(set(tables) | set(work)):
            if key in busy:
                continue
            with self._alone(key) as alone:
                if alone:
                    self._sweep_key(key, tables.get(key, []), work.get(key, []), key in kept)
        for info in self._backend.walk(layout.NAMES):
            if info.path.rpartition("/")[2].startswith(".") and self._old([info]):
                self._remove(info.path, "temporary", [info])

    # what must stay

    def _busy(self, work: dict[str, list[FileInfo]]) -> set[str]:
        """Keys whose lock somebody holds: being written, or read by a writer."""
        names = {info.path.rpartition("/")[2] for info in self._backend.walk(layout.WORK)}
        keys = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        return {key for key in keys | set(work) if layout.KEY.fullmatch(key) and self._held(key)}

    def _held(self, key: str) -> bool:
        lock = self._backend.lock(layout.lock(key))
        if lock is None or self._backend.stat(layout.lock(key)) is None:
            return False
        free = lock.try_exclusive()
        if free:
            lock.release(unlink=not self._dry_run)
        return not free

    def _roots(
        self, tables: dict[str, list[FileInfo]], work: dict[str, list[FileInfo]], busy: set[str]
    ) -> set[str]:
        roots = set(busy)
        for name in self._store.names():
            roots.update(self._store.history(name)[: 1 + self._keep_history])
        for key, files in work.items():
            if key in busy or not self._old(files + tables.get(key, [])):
                roots.add(key)
                roots.update(self._inputs(key))
        for key in tables:
            info = self._backend.stat(layout.manifest(key))
            if info is not None and not self._old([info]):
                roots.add(key)
        return roots

    def _inputs(self, key: str) -> list[str]:
        try:
            intent = json.loads(self._backend.read(f"{layout.work(key)}/intent.json"))
        except FileNotFoundError:
            return []
        return list(intent["inputs"])

    def _reached(self, roots: set[str]) -> set[str]:
        """Roots and all their ancestors that are there."""
        reached: set[str] = set()
        stack = list(roots)
        while stack:
            key = stack.pop()
            if key not in reached:
                reached.add(key)
                if self._store.exists(key):
                    stack.extend(self._store.manifest(key).parents)
        return reached

    # what goes

    def _sweep_key(self, key: str, table: list[FileInfo], work: list[FileInfo], kept: bool) -> None:
        if not self._store.exists(key):
            if not kept and self._old(table + work):
                self._remove_tree(layout.table(key), "unfinished", table)
                self._remove_tree(layout.work(key), "work", work)
            return
        if not kept:
            self._remove_table(key, table)
        else:
            listed = {item["path"] for item in self._store.manifest(key).files()}
            listed.add("manifest.json")
            for info in table:
                inside = info.path.removeprefix(f"{layout.table(key)}/")
                if inside not in listed and self._old([info]):
                    self._remove(info.path, "orphan", [info])
        if self._old(work):
            self._remove_tree(layout.work(key), "work", work)

    @contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Hold a key's lock for the block if nobody else does."""
        lock = None if self._dry_run else self._backend.lock(layout.lock(key))
        if lock is None:
            yield True
            return
        alone = lock.try_exclusive()
        try:
            yield alone
        finally:
            lock.release(unlink=alone)

    def _old(self, files: list[FileInfo]) -> bool:
        return all(info.modified <= self._before for info in files)

    def _remove_table(self, key: str, files: list[FileInfo]) -> None:
        if not self._dry_run:
            self._backend.remove(layout.manifest(key))
        self._remove_tree(layout.table(key), "table", files)

    def _remove_tree(self, path: str, what: What, files: list[FileInfo]) -> None:
        if not self._dry_run:
            self._backend.remove_tree(path)
        if files:
            self.items.append(GcItem(path, what, sum(info.size for info in files)))

    def _remove(self, path: str, what: What, files: list[FileInfo]) -> None:
        if not self._dry_run:
            self._backend.remove(path)
        self.items.append(GcItem(path, what, sum(info.size for info in files)))


def _by_key(backend: Backend, folder: str) -> dict[str, list[FileInfo]]:
    """The files under each key's folder."""
    out: dict[str, list[FileInfo]] = {
        key: [] for key in backend.folders(folder) if layout.KEY.fullmatch(key)
    }
    for info in backend.walk(folder):
        key = info.path.split("/")[1]
        if key in out:
            out[key].append(info)
    return out


def remove(store: "Store", ref: str) -> None:
    """Delete one table, its manifest first, or, by its whole key, unfinished work on one.

    Raises:
        StoreError: no such table, or a writer is using it.
    """
    backend = store.backend
    unfinished = layout.KEY.fullmatch(ref) and next(backend.walk(layout.work(ref)), None)
    key = ref if unfinished else store.resolve(ref)
    with disk_errors(f"table {ref!r}"), held(backend.lock(layout.GC_LOCK), exclusive=True):
        lock: FileLock | None = backend.lock(layout.lock(key))
        if lock is not None and not lock.try_exclusive():
            raise StoreError(
                f"table {ref!r} ({key[:12]}): expected nobody to be using it, found a writer "
                "that makes or reads it; let it finish first"
            )
        try:
            backend.remove(layout.manifest(key))
            backend.remove_tree(layout.table(key))
            backend.remove_tree(layout.work(key))
        finally:
            if lock is not None:
                lock.release(unlink=True)
