"""The store's tables as a service lists them, and the graph of what was made from what."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import StoreError
from ..storage import Manifest, Store
from .errors import NotServed, ServiceError

REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a name or key looks like; nothing that could leave a folder does."""
_FRESH_SECONDS = 2.0
_NODES = 400


class Damaged(ServiceError):
    """The store holds something else than its manifests say."""

    status = 500
    kind = "store"


@dataclass(slots=True)
class Listing:
    """All committed tables by key, and what names point to."""

    manifests: dict[str, Manifest]
    names: dict[str, list[str]] = field(default_factory=dict)

    def newest(self, step: str | None, named: bool) -> list[Manifest]:
        """Tables of a step (or all), newest first; with `named` those that a name points to."""
        found = [
            one
            for one in self.manifests.values()
            if (step is None or one.step == step) and (not named or one.key in self.names)
        ]
        return sorted(found, key=lambda one: (one.created, one.key), reverse=True)

    def ancestors(self, key: str) -> dict[str, None]:
        """Keys of a table and of all it was made from, nearest first."""
        found = {key: None}
        wave = [key]
        while wave:
            parents = [p for one in wave if one in self.manifests for p in self.parents(one)]
            wave = [parent for parent in dict.fromkeys(parents) if parent not in found]
            found.update(dict.fromkeys(wave))
        return found

    def parents(self, key: str) -> list[str]:
        """Keys of the inputs of a table; none for one that is not there."""
        return list(self.manifests[key].parents) if key in self.manifests else []

    def made_from(self, key: str) -> set[str]:
        """Keys of the tables that a table went into, near or far."""
        children: dict[str, list[str]] = {}
        for one in self.manifests.values():
            for parent in one.parents:
                children.setdefault(parent, []).append(one.key)
        found: set[str] = set()
        wave = [key]
        while wave:
            wave = [c for one in wave for c in children.get(one, ()) if c not in found]
            found.update(wave)
        return found


_LISTINGS: WeakKeyDictionary[Store, tuple[float, Listing]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def listing(store: Store) -> Listing:
    """All tables, read again after two seconds; raises Damaged where a manifest is."""
    with _LOCK:
        held = _LISTINGS.get(store)
        if held is not None and time.monotonic() - held[0] < _FRESH_SECONDS:
            return held[1]
        try:
            made = Listing({one.key: one for one in store.tables()})
            for name, key in store.names().items():
                made.names.setdefault(key, []).append(name)
        except StoreError as error:
            raise Damaged(f"the store cannot be listed: {error}") from error
        _LISTINGS[store] = time.monotonic(), made
        return made


def manifest_of(store: Store, ref: str) -> Manifest:
    """The manifest of a name or key that the store lists; NotServed for anything else."""
    if not REF.fullmatch(ref):
        raise NotServed("a table is named by its name or key; GET /v1/tables lists them.")
    try:
        return store.manifest(ref)
    except StoreError as error:
        if store.exists(ref) or ref in store.names():
            raise Damaged(f"table `{ref}` cannot be read: {error}") from error
        raise NotServed(f"no table `{ref}` in the store; GET /v1/tables lists them.") from error


def summary(manifest: Manifest, names: Iterable[str]) -> dict[str, Any]:
    """A table in one line."""
    return {
        "key": manifest.key,
        "name": manifest.name,
        "names": sorted(names),
        "step": manifest.step,
        "kind": manifest.kind,
        "rows": manifest.rows,
        "kept": manifest.kept,
        "dropped": sum(manifest.dropped.values()),
        "reasons": dict(manifest.dropped),
        "rejected": manifest.rejected,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "created": manifest.created,
        "report": report_of(manifest),
    }


def report_of(manifest: Manifest) -> str | None:
    """Name of the page attached to a table."""
    names = [item["name"] for item in manifest.attachments]
    return next((name for name in names if name.endswith("report.html")), None)


def graph(tables: Listing, key: str, *, descendants: bool) -> dict[str, Any]:
    """Nodes with their depth (0 for a source), and edges from input to table.

    With `descendants` also what was made from the table, and what that was made from.
    """
    members = tables.ancestors(key)
    if descendants:
        for one in sorted(tables.made_from(key)):
            members.update(tables.ancestors(one))
    shown = list(members)[:_NODES]
    depth = _depths(tables, members)
    known = set(shown)
    return {
        "key": key,
        "nodes": [_node(tables, one, depth[one]) for one in shown],
        "edges": [
            {"from": parent, "to": one}
            for one in shown
            for parent in dict.fromkeys(tables.parents(one))
            if parent in known
        ],
        "left_out": len(members) - len(shown),
    }


def _node(tables: Listing, key: str, depth: int) -> dict[str, Any]:
    manifest = tables.manifests.get(key)
    if manifest is None:
        return {"key": key, "name": "missing", "missing": True, "depth": depth}
    made = summary(manifest, tables.names.get(key, ()))
    return {**made, "missing": False, "depth": depth}


def _depths(tables: Listing, members: Mapping[str, None]) -> dict[str, int]:
    """Longest way from a source to each member."""
    depth: dict[str, int] = {}
    stack = list(members)
    while stack:
        key = stack[-1]
        waiting = [parent for parent in tables.parents(key) if parent not in depth]
        if waiting:
            stack.extend(waiting)  # a key is a digest of its inputs': no circles
            continue
        stack.pop()
        depth[key] = 1 + max((depth[parent] for parent in tables.parents(key)), default=-1)
    return depth
