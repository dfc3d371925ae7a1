"""The store: immutable tables under content keys, and names that point to them."""

import datetime
import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pyarrow as pa

from ..errors import InputError, StoreError
from . import layout, schemas
from .backend import connect
from .locks import held
from .manifest import Kind, Manifest, key_of
from .shard import ShardWriter, disk_errors
from .table import Table
from .upkeep import GcReport, Problem, collect, lineage, remove, verify
from .writer import TableWriter

_HISTORY = 20


class Store:
    """Tables, indexes and reports at one place: a folder, or a bucket and prefix.

    Nothing is created before something is written. A store can be pickled and opened again
    in another process.

    Args:
        uri: a path, `file://…`, or `s3://bucket/prefix` (the extra `s3`).
        storage_options: for S3, keyword arguments of `s3fs.S3FileSystem`
            (`endpoint_url`, `key`, `secret`, …); the usual AWS_* variables work as well.

    Raises:
        InputError: a URI of another kind.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] = "./prunery-store",
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = connect(os.fspath(uri), dict(storage_options or {}))
        self.uri = self.backend.uri
        self._options = dict(storage_options or {})

    @staticmethod
    def default_uri() -> str:
        """Return `PRUNERY_STORE` where it is set, else `./prunery-store`."""
        return os.environ.get("PRUNERY_STORE") or "./prunery-store"

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[Callable[..., "Store"], tuple[str, dict[str, Any]]]:
        return _open, (self.uri, self._options)

    # -- writing -------------------------------------------------------------------------------

    def key(
        self,
        *,
        step: str,
        version: int = 1,
        options: Mapping[str, Any] | None = None,
        inputs: Sequence[str] = (),
        models: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> str:
        """Return the content key (64 hexadecimal digits) of what a step would make.

        Args:
            step: name of the step.
            version: raised whenever the step computes something else from the same input.
            options: all that the step's rows depend on, as JSON values.
            inputs: keys of the tables it reads; their order counts.
            models: digests by name of the models it runs.
            seed: of its random choices.

        Raises:
            InputError: an option is not JSON, an input is not a key.
        """
        for found in inputs:
            if not isinstance(found, str) or not layout.KEY.fullmatch(found):
                raise InputError(
                    f"expected inputs to be table keys of 64 hexadecimal digits, found {found!r}; "
                    "use Store.resolve to get the key of a name"
                )
        return key_of(
            step=layout.check_name(step, "a step"),
            version=version,
            options=dict(options or {}),
            inputs=list(inputs),
            models=dict(models or {}),
            seed=seed,
        )

    def exists(self, key: str) -> bool:
        """Is a table with this key committed?"""
        return bool(layout.KEY.fullmatch(key)) and (
            self.backend.stat(layout.manifest(key)) is not None
        )

    def write(
        self,
        *,
        name: str,
        step: str,
        version: int = 1,
        options: Mapping[str, Any] | None = None,
        inputs: Sequence[str] = (),
        models: Mapping[str, str] | None = None,
        seed: int = 0,
        schema: pa.Schema | None = None,
        kind: Kind = "table",
    ) -> TableWriter:
        """Return the writer of one table, to be used as a context manager.

            with store.write(name="chunks", step="chunk", schema=schema) as writer:
                for i in writer.pending(n):
                    with writer.shard(i) as shard:
                        shard.write(batch)
                manifest = writer.commit()

        Args:
            name: what will point to the table after the commit.
            schema: of the rows; None for a report, which has none.
            kind: `table`, `index` or `report`.
            step, version, options, inputs, models, seed: as in `key`.

        Raises:
            InputError: a bad name, option, input or schema.
        """
        if kind not in get_args(Kind):
            raise InputError(f"expected a kind among {get_args(Kind)}, found {kind!r}")
        if schema is None and kind == "table":
            raise InputError("expected a schema for a table, found none; pass schema=pa.schema(…)")
        return TableWriter(
            self,
            name=layout.check_name(name),
            kind=kind,
            step=step,
            version=version,
            options=options or {},
            inputs=inputs,
            models=models or {},
            seed=seed,
            schema=schemas.empty() if schema is None else schemas.check(schema),
        )

    def commit_once(
        self,
        produce: Callable[[ShardWriter], None],
        *,
        notes: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Manifest:
        """Write a table of one shard with `produce(shard)`, unless it is there already.

        The other arguments are those of `write`.
        """
        with self.write(**arguments) as writer:
            for i in writer.pending(1):
                with writer.shard(i) as shard:
                    produce(shard)
            return writer.commit(notes=notes)

    # -- names ---------------------------------------------------------------------------------

    def names(self) -> dict[str, str]:
        """Return what every name points to, sorted by name."""
        return {record["name"]: record["key"] for record in self._records()}

    def _records(self) -> list[dict[str, Any]]:
        out = []
        for info in self.backend.walk(layout.NAMES):
            label = info.path.rpartition("/")[2]
            if label.endswith(".json") and not label.startswith("."):
                record = self._record(label.removesuffix(".json"))
                if record is not None:
                    out.append(record)
        return sorted(out, key=lambda record: str(record["name"]))

    def _record(self, label: str) -> dict[str, Any] | None:
        path = layout.name(label)
        try:
            record = json.loads(self.backend.read(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{path}: expected JSON, found something else ({error}); remove the file and "
                "point the name again"
            ) from error
        if not isinstance(record, dict) or not {"name", "key", "history"} <= set(record):
            raise StoreError(f"{path}: expected name, key and history, found {record!r:.200}")
        return record

    def point(self, name: str, key: str) -> None:
        """Let a name point to a committed table, at once for every reader.

        The last 20 keys a name had are kept in its history, which protects the last of them
        from garbage collection.

        Raises:
            InputError: a bad name.
            StoreError: no such table.
        """
        layout.check_name(name)
        with held(self.backend.lock(layout.GC_LOCK)):
            if not self.exists(key):
                raise StoreError(
                    f"expected a committed table to point {name!r} to, found none with key {key}"
                )
            with (
                disk_errors(f"name {name!r}"),
                held(self.backend.lock(layout.NAMES_LOCK), exclusive=True),
            ):
                self._point(name, key)

    def _point(self, name: str, key: str) -> None:
        old = self._record(name)
        if old is not None and old["key"] == key:
            return
        history = [] if old is None else [{"key": old["key"], "at": old["at"]}, *old["history"]]
        record = {
            "name": name,
            "key": key,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "history": history[:_HISTORY],
        }
        self.backend.replace(layout.name(name), json.dumps(record, indent=1).encode() + b"\n")

    def history(self, name: str) -> list[str]:
        """Return the keys that a name has had, the present one first."""
        record = self._record(layout.check_name(name))
        if record is None:
            raise StoreError(self._unknown(name))
        return [record["key"], *(item["key"] for item in record["history"])]

    def resolve(self, ref: str) -> str:
        """Return the key of a name, of a key, or of the start of one (6 digits or more).

        Raises:
            StoreError: nothing has that name or key, or several keys start like this.
        """
        if layout.KEY.fullmatch(ref) and self.exists(ref):
            return ref
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", ref):
            record = self._record(ref)
            if record is not None:
                return str(record["key"])
        if re.fullmatch(r"[0-9a-f]{6,63}", ref):
            keys = [key for key in self.backend.folders(layout.TABLES) if key.startswith(ref)]
            keys = [key for key in keys if self.exists(key)]
            if len(keys) == 1:
                return keys[0]
            if keys:
                raise StoreError(
                    f"expected the start of one key, found {len(keys)} tables that start with "
                    f"{ref}: {', '.join(key[:16] for key in keys)}; give more digits"
                )
        raise StoreError(self._unknown(ref))

    def _unknown(self, ref: str) -> str:
        names = list(self.names())
        close = difflib.get_close_matches(ref, names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "") if names else "none yet"
        return (
            f"expected a name or key (6 digits or more) in {self.uri}, found {ref!r}{hint} "
            f"(names there: {shown})"
        )

    # -- reading -------------------------------------------------------------------------------

    def manifest(self, ref: str) -> Manifest:
        """Return the manifest of a name or key.

        Raises:
            StoreError: no such table, or its manifest is damaged.
        """
        key = self.resolve(ref)
        path = layout.manifest(key)
        try:
            data = self.backend.read(path)
        except FileNotFoundError:
            raise StoreError(
                f"expected a table at {key}, to which {ref!r} points, found no manifest; "
                "run its step again"
            ) from None
        manifest = Manifest.from_bytes(data, path)
        if manifest.key != key:
            raise StoreError(
                f"{path}: expected the manifest of {key}, found that of {manifest.key}; "
                "the folder was renamed or copied: remove it"
            )
        return manifest

    def table(self, ref: str) -> Table:
        """Open a table by name or key. Raises as `manifest`."""
        return Table(self.backend, self.manifest(ref))

    def tables(self) -> list[Manifest]:
        """Return the manifests of all committed tables, oldest first."""
        keys = [key for key in self.backend.folders(layout.TABLES) if layout.KEY.fullmatch(key)]
        found = [self.manifest(key) for key in keys if self.exists(key)]
        return sorted(found, key=lambda manifest: (manifest.created, manifest.key))

    # -- upkeep --------------------------------------------------------------------------------

    def lineage(self, ref: str) -> list[Manifest]:
        """Return a table and all it was made from, ancestors first.

        Raises:
            StoreError: an ancestor is missing.
        """
        return lineage(self, ref)

    def verify(self, ref: str | None = None) -> list[Problem]:
        """Re-hash everything that a manifest lists, or that every manifest lists.

        Returns:
            What is wrong; empty where all is well.
        """
        return verify(self, ref)

    def gc(
        self,
        dry_run: bool = True,
        older_than_seconds: float = 86_400.0,
        keep_history: int = 3,
    ) -> GcReport:
        """Remove what nothing needs: see `upkeep.collect`."""
        return collect(
            self, dry_run=dry_run, older_than_seconds=older_than_seconds, keep_history=keep_history
        )

    def remove(self, ref: str) -> None:
        """Delete one table, e.g. one that `verify` found damaged, so that its step can run again.

        Names that point to it stay, and point to the new one once it is there. A whole key
        also stands for unfinished work, so that it starts over.

        Raises:
            StoreError: no such table, or a writer is using it.
        """
        remove(self, ref)


def _open(uri: str, options: dict[str, Any]) -> Store:
    return Store(uri, storage_options=options)
