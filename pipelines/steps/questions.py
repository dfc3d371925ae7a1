"""Step `questions`: what is asked, with the answers that a good context must still hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa

from ...errors import InputError
from ...storage import Table, row_id
from .. import sources
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answers", pa.list_(pa.string()), nullable=False),
    ]
)


class QuestionsOptions(StepOptions):
    """Options of `questions`.

    Attributes
    ----------
    path
        A JSONL file (or folder, pattern, list of them) of rows with `question`, optional
        `answers` (any one of them counts) and optional `id` (a name to show).
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | list[str]


def plan(options: QuestionsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """Scan the files; all questions of one file piece are one shard."""
    paths = [options.path] if isinstance(options.path, str) else options.path
    found = sources.scan(paths, format="jsonl")
    groups = sources.group_pieces(found.pieces)
    return Plan(
        SCHEMA, len(groups), {"source_digest": found.digest}, payload=groups, notes={"path": paths}
    )


def shard(job: Job, index: int, out: Rows) -> None:
    """Check and write the questions of one piece.

    A question asked twice would have one id; `id`s of the file, or else the row's place, keep
    such rows apart.
    """
    made: list[dict[str, Any]] = []
    for piece in job.plan.payload[index]:
        if piece.format != "jsonl":
            raise InputError(f"{piece.name}: questions must be JSON lines.")
        for row, line in sources.read_lines(piece):
            where = f"{piece.name}, row {row}"
            record = sources.parse_object(line, where, out.reject)
            if record is None:
                continue
            problem, column = _problem(record)
            if problem:
                out.reject(record, problem, f"{where}, column {column}")
                continue
            name = str(record.get("id", f"{piece.name}#{row}"))
            question = " ".join(record["question"].split())
            made.append(
                {
                    "id": row_id(name, question),
                    "name": name,
                    "question": question,
                    "answers": list(record.get("answers") or []),
                }
            )
    if made:
        out.write(pa.Table.from_pylist(made, SCHEMA))
    out.count(len(made), {})


def _problem(record: Mapping[str, Any]) -> tuple[str, str]:
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        return f"expected a question in words; found {question!r:.80}.", "question"
    answers = record.get("answers")
    fine = answers is None or (
        isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)
    )
    if not fine:
        return f"expected a list of answer strings; found {answers!r:.80}.", "answers"
    if not isinstance(record.get("id", ""), str | int):
        return f"expected a name or a number; found {record['id']!r:.80}.", "id"
    for text in (question, *(answers or ())):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "the text holds half of a surrogate pair.", "question"
    return "", ""


SPEC = StepSpec(
    name="questions",
    version=1,
    options=QuestionsOptions,
    inputs={},
    plan=plan,
    shard=shard,
    about="Questions with the answers that a good context must still hold.",
)
