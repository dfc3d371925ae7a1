"""The journal of a table in the making: one immutable entry for every finished shard."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from ..errors import StoreError
from . import layout
from .backend import Backend
from .ids import canonical_json, file_digest
from .manifest import Manifest, Part
from .shard import Entry


class Journal:
    """Entries of finished shards under one key, whichever process and attempt made them.

    An entry is created once: of two writers of a shard the first counts, and the second must
    have made the same rows.

    Attributes:
        own: the entries that count for the shards that this writer finished.
    """

    def __init__(self, backend: Backend, key: str, name: str) -> None:
        self.own: dict[int, Entry] = {}
        self._backend = backend
        self._key = key
        self._name = name
        self._files: list[str] = []
        self._checked: set[int] = set()

    def record(self, entry: Entry) -> None:
        """Enter a finished shard, or find that another writer did.

        Raises:
            StoreError: the other writer's shard has other rows. Its entry stays.
        """
        shard = entry["shard"]
        self._files.extend(part["path"] for part in files(entry))
        path = layout.journal(self._key, shard)
        first = entry
        if not self._backend.create(path, canonical_json(entry)):
            first = json.loads(self._backend.read(path))
            self.remove_others({part["path"] for part in files(first)}, of=entry)
            self._compare(shard, first["part"], entry["part"])
        self.own[shard] = first
        self._checked.add(shard)

    def compare(self, winner: Manifest) -> None:
        """Check what this writer finished against a manifest that another one committed.

        Raises:
            StoreError: a shard has other rows there.
        """
        theirs = {part["shard"]: part for part in winner.parts}
        for shard, entry in sorted(self.own.items()):
            self._compare(shard, theirs.get(shard), entry["part"])

    def _compare(self, shard: int, theirs: Part | None, ours: Part) -> None:
        if theirs is not None and theirs["logical_digest"] == ours["logical_digest"]:
            return
        found = "none" if theirs is None else theirs["logical_digest"]
        raise StoreError(
            f"table {self._name!r} ({self._key[:12]}): expected the same rows from the same "
            f"step, options, inputs and seed, found that two writers made shard {shard} with "
            f"digests {found} and {ours['logical_digest']}. The first stays. Make the step "
            "deterministic, or put what it depends on into its options"
        )

    def read(self) -> dict[int, Entry]:
        """Return all entries by shard, leaving out and removing those whose files are damaged."""
        entries: dict[int, Entry] = {}
        for info in self._backend.walk(f"{layout.work(self._key)}/journal"):
            name = info.path.rpartition("/")[2]
            if not name.endswith(".json") or name.startswith("."):
                continue
            try:
                entry: Entry = json.loads(self._backend.read(info.path))
            except FileNotFoundError:
                continue  # another writer committed meanwhile
            if self._holds(entry):
                entries[entry["shard"]] = entry
            else:
                self._backend.remove(info.path)
        return dict(sorted(entries.items()))

    def _holds(self, entry: Entry) -> bool:
        """Are the files of an entry still what it says? Looked at once for each shard."""
        if entry["shard"] in self._checked:
            return True
        for part in files(entry):
            path = f"{layout.table(self._key)}/{part['path']}"
            info = self._backend.stat(path)
            if info is None or info.size != part["bytes"]:
                return False
            local = self._backend.local(path)
            if local is not None and file_digest(local) != part["sha256"]:
                return False
        self._checked.add(entry["shard"])
        return True

    def remove_others(self, listed: set[str], of: Entry | None = None) -> None:
        """Remove the files of an entry, or all that this writer placed, that are not listed."""
        ours = self._files if of is None else [part["path"] for part in files(of)]
        for path in set(ours) - listed:
            self._backend.remove(f"{layout.table(self._key)}/{path}")


def files(entry: Entry) -> list[Part]:
    """Return the part of a shard, and its rejects where there are any."""
    return [entry["part"], *([entry["rejects"]] if entry["rejects"] else [])]


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up counts by reason."""
    out: Counter[str] = Counter()
    for count in counts:
        out.update(count)
    return dict(sorted(out.items()))
