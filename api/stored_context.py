"""A stored context run: its questions, and the scored sentences of one question's passages."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from ..pipelines.tables import rows_by_id, spans_of_equal
from ..storage import Manifest, Store, Table
from .errors import NotServed
from .table_cells import plain
from .table_list import Listing

_KEPT_INDEXES = 8
_INDEXES: OrderedDict[tuple[str, str], dict[int, int]] = OrderedDict()


class StoredContexts:
    """The signals table behind a table, with its questions, texts and decision.

    Raises NotServed where a table has no scored sentences behind it.
    """

    def __init__(self, store: Store, tables: Listing, key: str) -> None:
        lineage = [
            tables.manifests[one] for one in tables.ancestors(key) if one in tables.manifests
        ]
        signals = _first(lineage, "context_signals")
        if signals is None:
            raise NotServed(
                "this table comes from no pruning of contexts; GET /v1/tables?step=context_signals"
                " lists the tables that hold scored sentences."
            )
        self._store = store
        self.signals: Table = store.table(signals.key)
        behind = [tables.manifests[one] for one in tables.ancestors(signals.key)]
        self.decision = next(
            (
                one
                for one in [*lineage, *tables.newest("prune_context", named=True)]
                if one.step == "prune_context" and signals.key in one.parents
            ),
            None,
        )
        self.questions = store.table(_needed(behind, "questions").key)
        self.chunks = store.table(_needed(behind, "chunk").key)

    def describe(self) -> dict[str, Any]:
        """How the run decided, and with which network."""
        notes = self.signals.manifest.notes
        made: dict[str, Any] = {
            "signals": self.signals.key,
            "model": notes.get("model"),
            "threshold": notes.get("threshold"),
            "scores": "keep_probability" in self.signals.schema.names,
            "decision": None,
        }
        if self.decision is not None:
            options = self.decision.options
            settings = options.get("options", {})
            made["decision"] = {
                "key": self.decision.key,
                "name": self.decision.name,
                "method": options.get("method"),
                "options": {name: plain(value) for name, value in settings.items()},
            }
        return made

    def asked(self, offset: int, limit: int) -> list[dict[str, Any]]:
        """Some questions, in their table's order."""
        columns = ["id", "name", "question", "answers"]
        found: list[dict[str, Any]] = []
        at = 0
        for batch in self.questions.batches(columns=columns):
            first, last = max(offset - at, 0), min(offset + limit - at, batch.num_rows)
            at += batch.num_rows
            if first < last:
                found += batch.slice(first, last - first).to_pylist()
            if at >= offset + limit:
                break
        return [
            {
                "id": str(row["id"]),
                "name": row["name"],
                "question": row["question"],
                "answers": row["answers"],
            }
            for row in found
        ]

    def passages(self, question: int) -> dict[str, Any]:
        """The passages of one question as /v1/prune gives them with `return_scores`.

        Sentences say what the run decided in `stored_kept` and `stored_reason`.

        Raises
        ------
        NotServed
            The table has no such question.
        """
        found = self.questions.lookup([question], missing="skip").to_pylist()
        if not found:
            raise NotServed(f"no question {question} in this run; …/questions lists them.")
        rows = self._rows(question)
        results = self._results(rows) if rows is not None else []
        return {
            "question": {"id": str(question), "question": found[0]["question"]},
            "results": results,
            **self.describe(),
        }

    def _rows(self, question: int) -> pa.Table | None:
        shard = _shard_index(self._store, self.signals).get(question)
        if shard is None:
            return None
        wanted = ["id", "question", "passage", "chunk", "start", "end", "tokens"]
        wanted += [
            name
            for name in ("keep_probability", "relevance_logit")
            if name in self.signals.schema.names
        ]
        parts = [
            pa.Table.from_batches([batch]).filter(pc.equal(batch.column("question"), question))
            for batch in self.signals.shard_batches(shard, columns=wanted)
        ]
        return pa.concat_tables(parts)

    def _results(self, rows: pa.Table) -> list[dict[str, Any]]:
        listed = rows.to_pylist()
        texts = rows_by_id(self.chunks, [row["chunk"] for row in listed], ["text", "title"])
        stored = self._decided([row["id"] for row in listed])
        passage = rows.column("passage").to_numpy()
        made = []
        for index, (start, stop) in enumerate(spans_of_equal(passage)):
            part = listed[start:stop]
            chunk = texts[part[0]["chunk"]]
            logit = part[0].get("relevance_logit")
            made.append(
                {
                    "index": index,
                    "id": str(part[0]["passage"]),
                    "title": chunk["title"],
                    "text": chunk["text"],
                    "relevance": None if logit is None else _sigmoid(logit),
                    "relevance_logit": logit,
                    "sentences": [_sentence(row, stored.get(row["id"])) for row in part],
                }
            )
        return made

    def _decided(self, ids: list[int]) -> Mapping[int, Mapping[str, Any]]:
        if self.decision is None:
            return {}
        table = self._store.table(self.decision.key)
        found = table.lookup(ids, columns=["id", "keep", "reason", "score"], missing="skip")
        return {row["id"]: row for row in found.to_pylist()}


def _sentence(row: Mapping[str, Any], stored: Mapping[str, Any] | None) -> dict[str, Any]:
    made = {
        "id": str(row["id"]),
        "start": row["start"],
        "end": row["end"],
        "tokens": row["tokens"],
        "score": row.get("keep_probability"),
    }
    if stored is not None:
        made["stored_kept"] = stored["keep"]
        made["stored_reason"] = stored["reason"]
        made["stored_score"] = plain(stored["score"])
    return made


def _sigmoid(logit: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * logit))


def _first(lineage: list[Manifest], step: str) -> Manifest | None:
    return next((one for one in lineage if one.step == step), None)


def _needed(lineage: list[Manifest], step: str) -> Manifest:
    found = _first(lineage, step)
    if found is None:
        raise NotServed(f"the run's `{step}` table is gone from the store; run its recipe again.")
    return found


def _shard_index(store: Store, signals: Table) -> dict[int, int]:
    """Question id to the shard that holds its sentences; kept, as tables never change."""
    place = (str(store.uri), signals.key)
    held = _INDEXES.get(place)
    if held is None:
        held = {}
        for shard in signals.shards():
            for batch in signals.shard_batches(shard, columns=["question"]):
                for one in pc.unique(batch.column("question")).to_pylist():
                    held.setdefault(one, shard)
        _INDEXES[place] = held
        while len(_INDEXES) > _KEPT_INDEXES:
            _INDEXES.popitem(last=False)
    return held


def whole(text: str, what: str) -> int:
    """A 64-bit row id from a request; raises InputError for anything else."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        raise InputError(f"{what} is a whole number of up to 19 digits; found `{text:.40}`.")
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise InputError(f"{what} is a whole number of 64 bits; found `{text}`.")
    return value
