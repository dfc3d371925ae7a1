"""The sentences of each question's passages as arrays, and whether an answer survives a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import StoreError
from ..pruners import rules
from ..storage import Table
from .answers import find_answers
from .engine import Job, Slot
from .tables import rows_by_id, spans_of_equal

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
BASELINES = ("random", "first_k", "cosine")

# The inputs of every step that looks at what a decision left of each question's passages.
DECIDED_INPUTS = {
    "signals": Slot(("context_signals",)),
    "decision": Slot(("prune_context",)),
    "questions": Slot(("questions",)),
    "chunks": Slot(("chunk",)),
}


@dataclass(frozen=True)
class Bundle:
    """One question with the S sentences of its passages, in the order retrieved.

    Attributes
    ----------
    question
        Row of the questions table: id, name, question, answers.
    rows
        Row numbers [start, stop) of these sentences in the signals shard.
    ids, passage, chunk, position, tokens, chars
        (S,) each; `passage` is the id of the retrieved row, `chunk` that of its text.
    start, end
        (S,) character offsets in the chunk's text.
    texts
        Chunk id to text.
    occurrences
        For each place where an answer stands, the sentences it covers.
    """

    question: Mapping[str, Any]
    rows: tuple[int, int]
    ids: Ints
    passage: Ints
    chunk: Ints
    position: Ints
    tokens: Ints
    start: Ints
    end: Ints
    texts: Mapping[int, str]
    titles: Mapping[int, str]
    columns: pa.Table = field(repr=False)
    occurrences: list[Ints] = field(default_factory=list)

    @property
    def chars(self) -> Ints:
        """(S,) characters of each sentence."""
        return self.end - self.start

    @property
    def asked(self) -> bool:
        """Whether the question has answers to look for."""
        return bool(self.question["answers"])

    @property
    def answerable(self) -> bool:
        """Whether an answer stands in the passages at all."""
        return bool(self.occurrences)

    def survives(self, keep: Bools) -> bool:
        """Whether one occurrence of an answer has all its sentences kept, (S,) bool in."""
        return any(bool(keep[rows].all()) for rows in self.occurrences)

    def passages(self) -> list[tuple[int, int]]:
        """[start, stop) of the sentences of each passage."""
        return list(spans_of_equal(self.passage))


def bundles(signals: pa.Table, questions: Table, chunks: Table) -> Iterator[Bundle]:
    """The questions of a signals shard (rows of a question stand together), in its order."""
    asked = signals.column("question").to_numpy()
    if not len(asked):
        return
    rows = rows_by_id(questions, asked, ["name", "question", "answers"])
    for start, stop in spans_of_equal(asked):
        part = signals.slice(start, stop - start)
        arrays = {
            name: part.column(name).to_numpy().astype(np.int64)
            for name in ("id", "passage", "chunk", "position", "tokens", "start", "end")
        }
        texts = rows_by_id(chunks, arrays["chunk"], ["text", "title"])
        bundle = Bundle(
            rows[int(asked[start])],
            (start, stop),
            arrays["id"],
            arrays["passage"],
            arrays["chunk"],
            arrays["position"],
            arrays["tokens"],
            arrays["start"],
            arrays["end"],
            {key: row["text"] for key, row in texts.items()},
            {key: row["title"] for key, row in texts.items()},
            part,
        )
        bundle.occurrences.extend(_occurrences(bundle))
        yield bundle


def _occurrences(bundle: Bundle) -> Iterator[Ints]:
    answers = bundle.question["answers"]
    if not answers:
        return
    for first, last in bundle.passages():
        text = bundle.texts[int(bundle.chunk[first])]
        for start, end in find_answers(text, answers):
            inside = (bundle.start[first:last] < end) & (bundle.end[first:last] > start)
            if inside.any():
                yield first + np.flatnonzero(inside)


def baseline_masks(bundle: Bundle, limit: int, seed: int) -> dict[str, Bools]:
    """What three plain methods keep of a question's sentences within `limit` characters.

    random: in an order drawn from (seed, id). first_k: first sentences of every passage first.
    cosine: by similarity of the sentence's and the question's embeddings, where it was
    computed. Each takes sentences greedily while they fit, so none is over the limit.
    """
    scores: dict[str, npt.NDArray[np.floating[Any]]] = {
        "random": rules.uniform(seed, bundle.ids),
        "first_k": -bundle.position.astype(np.float64),
    }
    if "question_similarity" in bundle.columns.column_names:
        scores["cosine"] = bundle.columns.column("question_similarity").to_numpy()
    return {
        name: rules.within_cost(score, bundle.ids, bundle.chars, limit)
        for name, score in scores.items()
    }


def shard_of(table: Table, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One shard as a table in memory; shards of signals are cut to be small."""
    schema = table.schema
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(table.shard_batches(shard, columns=columns), schema=schema)


def aligned(decision: Table, signals: Table, shard: int) -> pa.Table:
    """The decision rows about one shard of signals, in its order.

    Raises
    ------
    StoreError
        The decision is about other rows.
    """
    rows = {part["shard"]: part["rows"] for part in signals.manifest.parts}
    mine = {part["shard"]: part["rows"] for part in decision.manifest.parts}
    if rows == mine:
        found = shard_of(decision, shard)
    else:
        before = sum(n for number, n in rows.items() if number < shard)
        found = _slice(decision, before, rows[shard])
    ids = shard_of(signals, shard, ["id"]).column("id")
    if not found.column("id").equals(ids):
        raise StoreError(
            f"decision `{decision.manifest.name}` ({decision.key[:12]}) is not about the rows of"
            f" `{signals.manifest.name}` ({signals.key[:12]}), shard {shard}. Make it again."
        )
    return found


def decided(job: Job, shard: int) -> Iterator[tuple[Bundle, Bools]]:
    """Each question of a shard of signals, with the (S,) mask that the job's decision took."""
    signals = job.input("signals")
    rows = aligned(job.input("decision"), signals, shard)
    keep = rows.column("keep").to_numpy(zero_copy_only=False)
    for bundle in bundles(shard_of(signals, shard), job.input("questions"), job.input("chunks")):
        yield bundle, keep[slice(*bundle.rows)]


def _slice(table: Table, start: int, length: int) -> pa.Table:
    """Rows [start, start + length) of a table that was decided in one piece."""
    parts: list[pa.RecordBatch] = []
    at = 0
    for batch in table.batches():
        first, last = max(start - at, 0), min(start + length - at, batch.num_rows)
        if first < last:
            parts.append(batch.slice(first, last - first))
        at += batch.num_rows
        if at >= start + length:
            break
    return pa.Table.from_batches(parts, schema=table.schema)
