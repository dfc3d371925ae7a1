"""Labelled rows for measuring context pruning: reading, checking, flattening.

One row is one (question, passage), from JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet:

============= ======================= ====================================================
field         type                    meaning
============= ======================= ====================================================
question      string                  as the user asked it
passage       string                  the text that is pruned
title         string or null          shown to the model before the passage; never counted
sentences     list of [start, end]    character borders in the passage, in order; between
                                      them may stand white space. If absent, split here
labels        list of integers        one a sentence: 1 evidence, 0 not, -1 unknown
answers       list of strings         accepted answers, any of them counts
relevant      1, 0 or -1              the passage answers the question, does not, unknown. If
                                      absent, whether `labels` holds a 1 (unknown without)
group         string                  id of the question; rows of one group are its
                                      candidates. If absent, the question itself
teacher_score number or null          a teacher's score; passed on by silver labelling
============= ======================= ====================================================

Further fields are ignored: rows made for training (`provence_rows`) are read as they are.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..pruners.context.sentences import split_sentences
from .answers import find_answers
from .context_metrics import Ints, Labelled, flatten_ids

Offsets = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ContextRow:
    """One question with one passage, its sentence borders and what is known about it."""

    question: str
    passage: str
    title: str | None = None
    sentences: Offsets = ()
    labels: tuple[int, ...] | None = None
    answers: tuple[str, ...] = ()
    relevant: int = -1
    group: str = ""
    teacher_score: float | None = None

    @property
    def texts(self) -> list[str]:
        """The sentences, sliced from the passage."""
        return [self.passage[start:end] for start, end in self.sentences]


def read_rows(paths: Iterable[Path | str]) -> list[ContextRow]:
    """All rows of some files, checked.

    Raises
    ------
    InputError
        A file is missing or no row format, or a row is not what the table above says; file,
        row (from 1) and field are in the message.
    """
    rows = []
    for path in map(Path, paths):
        for number, record in enumerate(_records(path), start=1):
            rows.append(parse_row(record, where=f"{path}, row {number}"))
    if not rows:
        raise InputError("no labelled rows were found; expected at least one. Check `--rows`.")
    return rows


Stamps = tuple[tuple[str, int, int], ...]


def stamps(paths: Sequence[str]) -> Stamps:
    """(path, size, time of change) of each file: a cheap sign that it is still the same."""
    found = []
    for path in paths:
        state = Path(path).stat() if Path(path).is_file() else None
        found.append((path, state.st_size if state else 0, state.st_mtime_ns if state else 0))
    return tuple(found)


def cached_rows(paths: Sequence[str]) -> list[ContextRow]:
    """`read_rows`, read again only when a file's size or time of change is another."""
    return _read_stamped(stamps(paths))


@lru_cache(maxsize=2)
def _read_stamped(of: Stamps) -> list[ContextRow]:
    return read_rows(path for path, _, _ in of)


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise InputError(f"rows file {path} does not exist; give a .jsonl, .jsonl.gz or .parquet.")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonlines", ".jsonlines.gz")):
        raise InputError(
            f"rows file {path} has an unknown ending; expected .jsonl, .jsonl.gz or .parquet."
        )
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_line(line, path, number)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} could not be read as UTF-8 text: {error}. Write it again.") from (
            error
        )


def _json_line(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, row {number} is not JSON: {error}. Mend that line.") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}, row {number} must be a JSON object; found {type(record)}.")
    return record


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def parse_row(record: Mapping[str, Any], *, where: str) -> ContextRow:
    """One row from a JSON object or Parquet record; `where` names it in errors."""
    question = _text(record, "question", where)
    passage = _text(record, "passage", where)
    title = record.get("title")
    if title is not None and not isinstance(title, str):
        raise InputError(f"{where}: `title` must be a string or null; found {title!r}.")
    sentences = _offsets(record.get("sentences"), passage, where)
    labels = _labels(record.get("labels"), len(sentences), where)
    answers = record.get("answers") or ()
    if isinstance(answers, str) or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{where}: `answers` must be a list of strings; found {answers!r}.")
    score = record.get("teacher_score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise InputError(f"{where}: `teacher_score` must be a number or null; found {score!r}.")
    return ContextRow(
        question=question,
        passage=passage,
        title=title,
        sentences=sentences,
        labels=labels,
        answers=tuple(answers),
        relevant=_relevant(record.get("relevant"), labels, where),
        group=str(record["group"]) if record.get("group") is not None else question,
        teacher_score=None if score is None else float(score),
    )


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: `{name}` must be a text that is not blank; found {value!r}.")
    return value


def _offsets(given: Any, passage: str, where: str) -> Offsets:
    if given is None:
        return tuple(split_sentences(passage))
    found: list[tuple[int, int]] = []
    last = 0
    for number, pair in enumerate(given):
        borders = tuple(pair) if isinstance(pair, list | tuple) else ()
        whole = len(borders) == 2 and all(type(x) is int for x in borders)
        if not whole or not last <= borders[0] < borders[1] <= len(passage):
            raise InputError(
                f"{where}: `sentences`[{number}] must be [start, end] with {last} <= start < end"
                f" <= {len(passage)}; found {pair!r}. Give character offsets, in order."
            )
        found.append((borders[0], borders[1]))
        last = borders[1]
    return _covering(found, passage, where)


def _covering(found: list[tuple[int, int]], passage: str, where: str) -> Offsets:
    """Borders that leave nothing out: white space between two sentences goes to the first."""
    starts = [0, *(start for start, _ in found[1:]), len(passage)]
    for (start, end), before, after in zip(found, starts, starts[1:], strict=False):
        for gap in ((before, start), (end, after)):
            if passage[slice(*gap)].strip():
                raise InputError(
                    f"{where}: `sentences` leave out characters {gap[0]} to {gap[1]} of the"
                    " passage; cover all of its text, or leave the field out."
                )
    if not found:
        raise InputError(f"{where}: `sentences` is empty; give borders, or leave the field out.")
    return tuple(pairwise(starts))


def _labels(given: Any, n: int, where: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    labels = tuple(given)
    if len(labels) != n or any(label not in (-1, 0, 1) for label in labels):
        raise InputError(
            f"{where}: `labels` must hold {n} of -1, 0, 1, one a sentence; found {labels!r}."
        )
    return tuple(int(label) for label in labels)


def _relevant(given: Any, labels: tuple[int, ...] | None, where: str) -> int:
    if given is not None:
        if given not in (-1, 0, 1):
            raise InputError(f"{where}: `relevant` must be 1, 0 or -1; found {given!r}.")
        return int(given)
    if labels is None or (1 not in labels and -1 in labels):
        return -1
    return int(1 in labels)


def rows_digest(rows: Sequence[ContextRow]) -> str:
    """sha256 over everything that signals and figures depend on, in row order."""
    hasher = hashlib.sha256()
    for row in rows:
        values = [getattr(row, name) for name in ContextRow.__dataclass_fields__]
        hasher.update(json.dumps(values, ensure_ascii=True).encode() + b"\n")
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Rows flattened for the metrics, and the names of the questions that stand behind them."""

    data: Labelled
    groups: list[str] = field(default_factory=list)


def flatten(rows: Sequence[ContextRow]) -> FlatRows:
    """Sentences, labels and answer occurrences of rows as flat arrays."""
    owner, groups = flatten_ids([row.group for row in rows])
    sizes = [len(row.sentences) for row in rows]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    spans = [
        (owner[i], starts[i] + first, starts[i] + last)
        for i, row in enumerate(rows)
        for first, last in answer_sentences(row)
    ]
    span = np.array(spans, dtype=np.int64).reshape(-1, 3)
    labels = [row.labels or (-1,) * size for row, size in zip(rows, sizes, strict=True)]
    data = Labelled(
        passage=np.repeat(np.arange(len(rows)), sizes).astype(np.int64),
        question=owner,
        chars=_ints(end - start for row in rows for start, end in row.sentences),
        label=_ints(label for row in labels for label in row),
        relevant=_ints(row.relevant for row in rows),
        span_question=span[:, 0],
        span_first=span[:, 1],
        span_last=span[:, 2],
        questions=len(groups),
    )
    return FlatRows(data, groups)


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def answer_sentences(row: ContextRow) -> list[tuple[int, int]]:
    """(first, last) sentence of each occurrence of an answer in the passage, both inclusive."""
    spans = np.array(find_answers(row.passage, row.answers), np.int64).reshape(-1, 2)
    begins = np.array([start for start, _ in row.sentences])
    first = np.searchsorted(begins, spans[:, 0], side="right") - 1
    last = np.searchsorted(begins, spans[:, 1] - 1, side="right") - 1
    return sorted(set(zip(first.tolist(), last.tolist(), strict=True)))
