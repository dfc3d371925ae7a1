"""Training rows of a Provence network: reading, checking, splitting by question.

One row is one (question, passage), from JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet. It is the
row that `prunery evaluate context` reads, with three more fields:

============= ======================= ====================================================
field         type                    meaning
============= ======================= ====================================================
question      string                  as a user asks it
passage       string                  the text
title         string or null          shown before the passage, never a label
sentences     list of [start, end]    character borders in the passage, in order
labels        list of integers        one a sentence: 1 keep, 0 drop, -1 no opinion
answers       list of strings         optional: answer strings inside kept sentences
teacher_score number or null          optional: a teacher reranker's raw logit
group         string                  optional: id of the question; splits are by it
weight        number                  optional: expected draws of the row in an epoch (1)
============= ======================= ====================================================

A row without a 1 is a passage that does not answer its question.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

from ..errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """One labelled (question, passage); fields as in the module's table."""

    question: str
    passage: str
    sentences: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]
    title: str | None = None
    answers: tuple[str, ...] = ()
    teacher_score: float | None = None
    group: str = ""
    weight: float = 1.0

    @property
    def relevant(self) -> bool:
        """Whether any sentence is to be kept."""
        return 1 in self.labels

    @property
    def texts(self) -> list[str]:
        """The sentences, sliced from the passage."""
        return [self.passage[start:end] for start, end in self.sentences]


def read_rows(path: Path) -> list[TrainRow]:
    """Every row of a file, checked; InputError names file, row (from 1) and column."""
    rows = [row_from(raw, f"{path}, row {i}") for i, raw in enumerate(_records(path), start=1)]
    if not rows:
        raise InputError(f"{path}: expected training rows, found none")
    return rows


def write_rows(path: Path, rows: Iterable[TrainRow]) -> int:
    """Write JSON Lines (gzip where the name ends so), replaced as a whole; the number of rows."""
    work = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with _writer(work, path.suffix == ".gz") as file:
        for row in rows:
            file.write((json.dumps(asdict(row), ensure_ascii=False) + "\n").encode())
            count += 1
    os.replace(work, path)
    return count


def row_from(raw: Mapping[str, Any], where: str) -> TrainRow:
    """One checked row from parsed JSON or a Parquet record."""
    question, passage = _string(raw, "question", where), _string(raw, "passage", where)
    title = raw.get("title")
    if title is not None and not isinstance(title, str):
        raise InputError(f"{where}, title: expected text or null, found {type(title).__name__}")
    sentences = _sentences(raw.get("sentences"), len(passage), where)
    labels = _list(raw.get("labels"), "labels", where)
    if len(labels) != len(sentences) or any(type(x) is not int or x not in _LABELS for x in labels):
        raise InputError(
            f"{where}, labels: expected {len(sentences)} values out of 1, 0 and -1 "
            f"(one a sentence), found {labels!r:.80}"
        )
    answers = _list(raw.get("answers") or [], "answers", where)
    if not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}, answers: expected a list of strings, found {answers!r:.80}")
    teacher = raw.get("teacher_score")
    weight = raw.get("weight")
    return TrainRow(
        question=question,
        passage=passage,
        title=title or None,
        sentences=sentences,
        labels=tuple(labels),
        answers=tuple(answers),
        teacher_score=None if teacher is None else _number(teacher, "teacher_score", where),
        group=str(raw.get("group") or question),
        weight=1.0 if weight is None else _number(weight, "weight", where, low=0.0),
    )


def split_by_group(
    rows: Iterable[TrainRow], share: float, seed: int
) -> tuple[list[TrainRow], list[TrainRow]]:
    """(training, validation): a share of the questions, chosen by a hash of (seed, group)."""
    train: list[TrainRow] = []
    valid: list[TrainRow] = []
    for row in rows:
        drawn = hashlib.sha256(f"{seed}\0{row.group}".encode()).digest()[:8]
        held = int.from_bytes(drawn, "big") / 2.0**64 < share
        (valid if held else train).append(row)
    return train, valid


_LABELS = frozenset({-1, 0, 1})


@contextmanager
def _writer(path: Path, zipped: bool) -> Iterator[IO[bytes]]:
    with path.open("wb") as plain:
        if zipped:
            # No name or time in the gzip header: equal rows give equal files.
            with gzip.GzipFile("", "wb", fileobj=plain, mtime=0) as file:
                yield cast("IO[bytes]", file)
        else:
            yield plain


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: expected a file of training rows, found none")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for i, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {i}: expected one JSON object ({error})") from error
            if not isinstance(raw, dict):
                raise InputError(f"{path}, line {i}: expected a JSON object, found {line!r:.60}")
            yield raw


def _string(raw: Mapping[str, Any], name: str, where: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}, {name}: expected text, found {value!r:.60}")
    return value


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}, {name}: expected a list, found {type(value).__name__}")
    return list(value)


def _sentences(value: Any, length: int, where: str) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    at = 0
    for pair in _list(value, "sentences", where):
        ok = isinstance(pair, list | tuple) and len(pair) == 2
        ok = ok and all(type(x) is int for x in pair)
        if not ok or not at <= pair[0] <= pair[1] <= length:
            raise InputError(
                f"{where}, sentences: expected [start, end] in order within 0..{length}, "
                f"found {pair!r:.60} after {at}"
            )
        found.append((pair[0], pair[1]))
        at = pair[1]
    if not found:
        raise InputError(f"{where}, sentences: expected at least one [start, end], found none")
    return tuple(found)


def _number(value: Any, name: str, where: str, low: float = -math.inf) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low:
        raise InputError(f"{where}, {name}: expected a finite number >= {low}, found {value!r:.60}")
    return float(value)
