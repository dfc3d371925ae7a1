"""Rows that an earlier table holds already: a step over grown input scores only what is new.

For steps that make the rows of each input row from that row alone. An earlier table serves if it
is of the same step, version, options, models and seed, and its input holds the same row: equal in
every column that the step reads, not only in its id. The key of the new table is what it would be
anyway, and its rows come in the order of a full run.

The numbers are those of the earlier run. Where a model takes several rows in one pass, other
company can change the last bits of a number (about 1e-6 of it in float32), so that the logical
digest of a table may depend on what the store held before. A run with `reuse` off scores all.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..storage import Manifest, Store, Table, TableWriter, canonical_json, layout, schemas
from ..storage.rowhash import row_hashes

if TYPE_CHECKING:
    from .engine import Job, Rows

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_CANDIDATES = 4
"""Earlier tables whose ids are compared, the newest; the one with most in common is taken."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier table of a step: its key, and the keys that filled its inputs."""

    key: str
    inputs: Mapping[str, str]


def _never(options: Any) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class RowWise:
    """How a step makes rows from single input rows.

    Attributes
    ----------
    inputs
        Roles whose tables may have grown; the ids of the first are those of the input rows.
    rows
        The input rows of a shard in their order, in pieces: column `id`, and all that the step
        reads of a row, or of what other tables hold about it.
    find
        The same columns for some ids, in any order; ids that are not there are left out. The
        job is that of the earlier table.
    score
        Makes and writes the rows of some input rows, in their order.
    owner
        Column of the step's rows that holds the id of the input row.
    group
        Column of the input rows, depending on options: rows with an equal value there are scored
        together or not at all.
    ignored
        Parts of a step's identity that only say which rows there are, or how they are cut.
    """

    inputs: tuple[str, ...]
    rows: Callable[[Job, int], Iterator[pa.Table]]
    find: Callable[[Job, Ids], pa.Table]
    score: Callable[[Job, pa.Table, Rows], None]
    owner: str = "id"
    group: Callable[[Any], str | None] = _never
    ignored: frozenset[str] = frozenset()

    def make(self, job: Job, index: int, out: Rows) -> None:
        """The shard function: rows of the earlier table where it has them, else new ones."""
        reused = 0
        for piece in self.rows(job, index):
            if job.earlier is None:
                self.score(job, piece, out)
            else:
                reused += self._mixed(job, job.earlier, piece, out)
        if job.earlier is not None:
            note = {"shard": index, "from": job.earlier.key, "rows": reused}
            path = f"{_notes(job.key)}/{index:05d}.json"
            job.store.backend.replace(path, canonical_json(note))

    def _mixed(self, job: Job, earlier: Earlier, piece: pa.Table, out: Rows) -> int:
        before = replace(job, key=earlier.key, inputs=earlier.inputs, earlier=None)
        known = self._known(before, piece)
        if not known.any():
            self.score(job, piece, out)
            return 0
        held = _Held(out)
        if not known.all():
            self.score(job, piece.filter(pa.array(~known)), held)  # type: ignore[arg-type]
        ids = _column(piece, "id")
        old = self._made(before, ids[known])
        out.count(old.num_rows, {})
        new = [schemas.conform(rows, old.schema) for rows in held.tables]
        both = pa.concat_tables([*new, old]).combine_chunks()
        order = np.argsort(ids, kind="stable")
        place = order[np.searchsorted(ids, _column(both, self.owner), sorter=order)]
        out.write(both.take(pa.array(np.argsort(place, kind="stable"))))
        return int(known.sum())

    def _known(self, before: Job, piece: pa.Table) -> Mask:
        """(N,) bool: input rows that the earlier run had too, and made rows of."""
        ids = _column(piece, "id")
        if len(np.unique(ids)) < len(ids):
            return np.zeros(len(ids), np.bool_)  # which rows belong to which cannot be told
        found = self.find(before, ids).select(piece.column_names)
        known = _same(piece, found) & np.isin(ids, self._owners(before)[0])
        column = self.group(before.options)
        if column is not None:
            groups = _column(piece, column)
            known &= ~np.isin(groups, groups[~known])
        return known

    def _made(self, before: Job, ids: Ids) -> pa.Table:
        """Rows that the earlier run made of these input rows, in table order."""
        if self.owner == "id":
            return before.output().lookup(ids)
        owners, own = self._owners(before)
        first = np.searchsorted(owners, ids, side="left")
        last = np.searchsorted(owners, ids, side="right")
        wanted = [own[a:b] for a, b in zip(first, last, strict=True)]
        return before.output().lookup(np.unique(np.concatenate(wanted)))

    def _owners(self, before: Job) -> tuple[Ids, Ids]:
        """Ids of the input rows that the earlier run made rows of, sorted, and ids of the rows."""
        found = _OWNERS.pop((before.store.uri, before.key), None)
        if found is None:
            columns = list(dict.fromkeys(["id", self.owner]))
            read = before.output().to_table(columns=columns)
            owners, ids = _column(read, self.owner), _column(read, "id")
            order = np.argsort(owners, kind="stable")
            found = owners[order], ids[order]
        _OWNERS[before.store.uri, before.key] = found
        while len(_OWNERS) > 4:
            _OWNERS.popitem(last=False)
        return found

    # -- which table -----------------------------------------------------------------------------

    def earlier(self, job: Job, writer: TableWriter, store: Store) -> Earlier | None:
        """The earlier table with most input rows in common, if there is any with one."""
        fitting = self._all_fitting(job, writer, _named(job, store))
        fitting = fitting or self._all_fitting(job, writer, reversed(store.tables()))
        if not fitting:
            return None
        if not self.inputs:
            return fitting[0]
        ids = _ids(job.input(self.inputs[0]))
        counts = [_common(ids, _ids(store.table(one.inputs[self.inputs[0]]))) for one in fitting]
        best = int(np.argmax(counts))
        return fitting[best] if counts[best] else None

    def _all_fitting(
        self, job: Job, writer: TableWriter, manifests: Iterable[Manifest]
    ) -> list[Earlier]:
        found = (self._fitting(job, writer, manifest) for manifest in manifests)
        return list(islice((one for one in found if one is not None), _CANDIDATES))

    def _fitting(self, job: Job, writer: TableWriter, manifest: Manifest) -> Earlier | None:
        """That table as an earlier one, if all that its rows depend on is the same."""
        then, now = dict(manifest.options), json.loads(canonical_json(writer.options))
        for name in self.ignored:
            then.pop(name, None)
            now.pop(name, None)
        same = (
            (manifest.step, manifest.version, manifest.seed)
            == (writer.step, writer.version, writer.seed)
            and manifest.key != writer.key
            and then == now
            and manifest.models == dict(writer.models)
            and manifest.pa_schema().equals(writer.schema)
            and len(manifest.parents) == len(job.inputs)
            and manifest.rows > 0
        )
        if not same:
            return None
        inputs = dict(zip(job.inputs, manifest.parents, strict=True))
        fixed = all(key == inputs[role] for role, key in job.inputs.items() if self._fixed(role))
        there = all(job.store.exists(inputs[role]) for role in self.inputs if role in inputs)
        return Earlier(manifest.key, inputs) if fixed and there else None

    def _fixed(self, role: str) -> bool:
        return role not in self.inputs

    def reused(self, job: Job, shards: int) -> dict[str, Any]:
        """For the notes of the table: how many input rows' rows came from which table."""
        counts: Counter[str] = Counter()
        for info in job.store.backend.walk(_notes(job.key)):
            if info.path.endswith(".json"):
                note = json.loads(job.store.backend.read(info.path))
                if note["shard"] < shards:  # an attempt before this one may have cut otherwise
                    counts[note["from"]] += note["rows"]
        made = {key: rows for key, rows in sorted(counts.items()) if rows}
        return {"reused": made} if made else {}


class _Held:
    """Rows that wait for those of the earlier table; what else a shard says goes straight out."""

    def __init__(self, out: Rows) -> None:
        self.tables: list[pa.Table] = []
        self.reject = out.reject
        self.count = out.count

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        self.tables.append(rows)


_OWNERS: OrderedDict[tuple[str, str], tuple[Ids, Ids]] = OrderedDict()


def _named(job: Job, store: Store) -> Iterator[Manifest]:
    """Tables that the step's name pointed to, the newest first."""
    if job.table in store.names():
        for key in store.history(job.table):
            if store.exists(key):
                yield store.manifest(key)


def _notes(key: str) -> str:
    """Where shards say what they took: beside the journal, and gone with it after the commit."""
    return f"{layout.work(key)}/reused"


def _ids(table: Table) -> Ids:
    return _column(table.to_table(columns=["id"]), "id")


def _common(ids: Ids, others: Ids) -> int:
    return len(np.intersect1d(ids, others))


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return np.asarray(table.column(name).to_numpy())


def _same(piece: pa.Table, found: pa.Table) -> Mask:
    """(N,) bool: rows of `piece` that stand in `found` with equal values in every column."""
    ids, others = _column(piece, "id"), _column(found, "id")
    order = np.argsort(others, kind="stable")
    others = others[order]
    first = np.searchsorted(others, ids, side="left")
    once = np.searchsorted(others, ids, side="right") - first == 1
    mine, theirs = _hashes(piece), _hashes(found)[:, order]
    same = np.zeros(len(ids), np.bool_)
    same[once] = (mine[:, once] == theirs[:, first[once]]).all(axis=0)
    return same


def _hashes(rows: pa.Table) -> npt.NDArray[np.uint64]:
    """(2, N) hash of each row."""
    found = [row_hashes(batch) for batch in rows.combine_chunks().to_batches()]
    return np.concatenate(found, axis=1) if found else np.zeros((2, 0), np.uint64)


def read_rows(table: Table, ids: Ids, columns: list[str]) -> pa.Table:
    """Rows of a table with these ids; those that it does not hold are left out."""
    return table.lookup(ids, columns=columns, missing="skip")
