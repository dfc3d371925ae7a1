"""What became of a row: walked through the lineage, from its first table to the last decision.

Decisions are sidecar tables keyed by row id, so nothing is computed here: the score, threshold,
reason and rival are those that were stored when the decision was taken.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from ..storage import Manifest, Store, Table
from .prompts.explain_words import WORD_TABLES, describe_word, word_lines

_DECIDING = (
    "prune_passages",
    "prune_context",
    "prune_sft",
    "prune_dataset",
    "prune_prompts",
)
_SHOWN = 200  # characters of a text in words
_LISTED = 20  # rows of a list in words
_VALUES = 8  # of a feature vector


@dataclass(frozen=True, slots=True)
class Verdict:
    """One decision about one row.

    `threshold` is None where none applied, `rival` None where the row lost to no other; then
    `rival_text` says what the rival is.
    """

    table: str
    key: str
    method: str
    row: int
    kept: bool
    score: float
    threshold: float | None
    reason: str
    rival: int | None = None
    rival_text: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row, where it came from, and every decision about it or about its parts.

    Attributes
    ----------
    row
        The row as stored.
    place
        What it is, in words: a passage of a file, a sentence of a passage.
    verdicts
        Decisions about this row itself.
    parts
        Decisions about its sentences, where the row is a retrieved passage.
    seen
        What happened besides decisions: which questions found a passage, at which rank; how a
        word went through the stages of prompt search.
    """

    table: str
    key: str
    step: str
    row: Mapping[str, Any]
    place: str
    text: str
    verdicts: list[Verdict] = field(default_factory=list)
    parts: list[Verdict] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes are told by their number."""
        made = asdict(self)
        made["row"] = {
            name: f"{len(value)} bytes" if isinstance(value, bytes) else value
            for name, value in made["row"].items()
        }
        return made

    def lines(self) -> list[str]:
        """In words."""
        made = [f"row {self.row['id']} of {self.table} ({self.step}, {self.key[:12]})"]
        if self.place:
            made.append(f"  {self.place}")
        if self.text:
            made.append(f"  {_short(self.text)!r}")
        made += [f"  {line}" for line in self.seen]
        for verdict in self.verdicts:
            made += [f"  {line}" for line in _verdict_lines(verdict)]
        if self.parts:
            kept = sum(part.kept for part in self.parts)
            made.append(f"  {kept} of its {len(self.parts)} sentences were kept:")
            made += [f"    {_verdict_lines(part)[0]}: {_short(part.text)!r}" for part in self.parts]
        told = self.step in WORD_TABLES and self.seen  # their filters are decisions too
        if not self.verdicts and not self.parts and not told:
            made.append("  no step has decided about this row")
        return made


def explain(store: Store, table_ref: str, row_id: int) -> Explanation:
    """Walk the lineage for one row of a table: a passage, its sentence, a chat and so on.

    Decisions are looked for in the table itself, in what it was made from, and in tables made
    from it that a name points to.

    Raises
    ------
    InputError
        The table has no such row, or no row ids.
    """
    manifest = store.manifest(table_ref)
    family = _Family(store, manifest)
    table = family.open(manifest)
    if "id" not in table.schema.names:
        raise InputError(
            f"table `{manifest.name}` has no row ids; explain rows of a table of passages,"
            " sentences or decisions (`prunery ls`)."
        )
    found = table.lookup([row_id], missing="skip").to_pylist()
    if not found:
        raise InputError(
            f"table `{manifest.name}` ({manifest.key[:12]}) has no row {row_id}. `prunery show"
            f" {manifest.name}` prints ids."
        )
    row = found[0]
    place, text = family.describe(row_id, row)
    passage = manifest.step in ("retrieve", "pack")
    parts = list(family.parts(row_id)) if passage else []
    return Explanation(
        table=manifest.name,
        key=manifest.key,
        step=manifest.step,
        row=row,
        place=place,
        text=text,
        verdicts=list(family.verdicts([row_id])),
        parts=parts,
        seen=family.seen(row_id),
    )


class _Family:
    """A table, its ancestors, and the named tables made from it, by step."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        members = {m.key: m for m in store.lineage(manifest.key)}
        for key in dict.fromkeys(store.names().values()):
            lineage = {m.key: m for m in store.lineage(key)}
            if manifest.key in lineage:
                members.update(lineage)
        self.members = list(members.values())
        self._tables: dict[str, Table] = {}

    def open(self, manifest: Manifest) -> Table:
        if manifest.key not in self._tables:
            self._tables[manifest.key] = self._store.table(manifest.key)
        return self._tables[manifest.key]

    def of(self, *steps: str) -> Iterator[Table]:
        for manifest in self.members:
            if manifest.step in steps:
                yield self.open(manifest)

    def _find(self, row_id: int, *steps: str) -> dict[str, Any] | None:
        for table in self.of(*steps):
            rows: list[dict[str, Any]] = table.lookup([row_id], missing="skip").to_pylist()
            if rows:
                return rows[0]
        return None

    def verdicts(self, ids: Iterable[int]) -> Iterator[Verdict]:
        """Decisions about those rows, in the order of the tables, then of the ids."""
        wanted = list(ids)
        for table in self.of(*_DECIDING):
            for row in table.lookup(wanted, missing="skip").to_pylist():
                rival = row["rival"]
                yield Verdict(
                    table=table.manifest.name,
                    key=table.key,
                    method=str(table.manifest.options.get("method", "")),
                    row=row["id"],
                    kept=row["keep"],
                    score=row["score"],
                    threshold=row["threshold"],
                    reason=row["reason"] + _training(table.manifest.step, row),
                    rival=rival,
                    rival_text=": ".join(self.describe(rival)) if rival is not None else "",
                    text=self.describe(row["id"])[1],
                )

    def parts(self, retrieved: int) -> Iterator[Verdict]:
        """Decisions about the sentences of a retrieved passage, in their order."""
        for table in self.of("context_signals"):
            ids = [row["id"] for row in _where(table, ["id", "passage"], "passage", retrieved)]
            yield from self.verdicts(ids)

    def describe(self, row_id: int, row: Mapping[str, Any] | None = None) -> tuple[str, str]:
        """(what the row is, its text); empty strings where it is none of those known here."""
        sentence = self._find(row_id, "context_signals")
        if sentence is not None:
            chunk = self._find(sentence["chunk"], "chunk")
            if chunk is None:
                return f"sentence {sentence['position'] + 1} of a passage", ""
            where = f"sentence {sentence['position'] + 1} of {_place(chunk)}"
            asked = self._question(sentence["question"])
            return where + asked, chunk["text"][sentence["start"] : sentence["end"]]
        retrieved = self._find(row_id, "retrieve")
        if retrieved is not None:
            chunk = self._find(retrieved["passage"], "chunk")
            rank = f"rank {retrieved['rank'] + 1}, similarity {retrieved['score']:.3f}"
            asked = self._question(retrieved["question"])
            return f"{_place(chunk)}, {rank}{asked}", chunk["text"] if chunk else ""
        chunk = self._find(row_id, "chunk")
        if chunk is not None:
            return _place(chunk), chunk["text"]
        chat = self._find(row_id, "read_chats")
        if chat is not None:
            domain = f" ({chat['domain']})" if chat["domain"] else ""
            said = [m["content"] for m in chat["messages"] if m["role"] in ("assistant", "text")]
            return f"chat {chat['source']}{domain}", said[-1] if said else ""
        for table in self.of("read_dataset"):
            for labelled in table.lookup([row_id], missing="skip").to_pylist():
                return _labelled(labelled, table.manifest.notes.get("classes", []))
        word = describe_word(self.of, row_id)
        if word is not None:
            return word
        question = self._find(row_id, "questions")
        return ("a question", question["question"]) if question else ("", "")

    def _question(self, question_id: int) -> str:
        question = self._find(question_id, "questions")
        return f", for the question {question['question']!r}" if question else ""

    def seen(self, row_id: int) -> list[str]:
        """For a passage: which questions found it. For a word: what became of it."""
        if self._find(row_id, "chunk") is None:
            return word_lines(self.of, row_id)
        made: list[str] = []
        for table in self.of("retrieve"):
            rows = list(_where(table, ["id", "question", "passage", "rank"], "passage", row_id))
            name = table.manifest.name
            if not rows:
                made.append(f"{name}: no question found it")
                continue
            made.append(f"{name}: found by {len(rows)} questions")
            made += [
                f"  rank {row['rank'] + 1}{self._question(row['question'])}"
                f" (row {row['id']} of {name})"
                for row in rows[:_LISTED]
            ]
        return made


def _where(table: Table, columns: list[str], column: str, value: int) -> Iterator[dict[str, Any]]:
    for batch in table.batches(columns=columns):
        hits = pa.Table.from_batches([batch]).filter(pc.equal(batch.column(column), value))
        yield from hits.to_pylist()


def _place(chunk: Mapping[str, Any] | None) -> str:
    if chunk is None:
        return "a passage"
    title = f" ({chunk['title']})" if chunk["title"] else ""
    return f"{chunk['source']} [{chunk['start']}:{chunk['end']}]{title}"


def _labelled(row: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, str]:
    """(what a row of a labelled data set is, its content in words)."""

    def name(code: int) -> str:
        return repr(classes[code]) if code < len(classes) else f"class {code}"

    label = f"labelled {name(row['label'])}"
    if row["clean_label"] >= 0 and row["clean_label"] != row["label"]:
        label += f" but truly {name(row['clean_label'])}"
    group = f", group {row['group']!r}" if row["group"] else ""
    content = row["text"]
    if row["image"]:
        content = _picture(row["image"])
    elif row["features"]:
        first = ", ".join(f"{value:.4g}" for value in row["features"][:_VALUES])
        content = f"{len(row['features'])} features: {first}"
        content += ", …" if len(row["features"]) > _VALUES else ""
    return f"{row['source']} ({row['split']}), {label}{group}", content


def _picture(image: bytes) -> str:
    from PIL import Image

    size = f"{len(image):,} bytes"
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return f"{opened.format} image, {opened.width} x {opened.height}, {opened.mode}, {size}"
    except (OSError, ValueError, Image.DecompressionBombError):
        return f"an image that cannot be read, {size}"


def _training(step: str, row: Mapping[str, Any]) -> str:
    """What a decision says of training on the row besides whether it stays."""
    if step == "prune_sft":
        return f", {row['kept_tokens']} of {row['tokens']} tokens"
    if step == "prune_dataset" and row["keep"] and row["weight"] != 1.0:
        return f", weight {row['weight']:.4g}"
    return ""


def _verdict_lines(verdict: Verdict) -> list[str]:
    limit = "" if verdict.threshold is None else f", threshold {verdict.threshold:.4g}"
    made = [
        f"{'kept' if verdict.kept else 'dropped'} by {verdict.table} ({verdict.method}):"
        f" {verdict.reason}, score {verdict.score:.4g}{limit}"
    ]
    if verdict.rival is not None:
        made.append(f"  lost to row {verdict.rival}: {_short(verdict.rival_text)}")
    return made


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…"
