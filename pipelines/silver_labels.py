"""Silver labels: a language model answers from numbered sentences and cites what it used.

The cited sentences become the evidence labels that the context pruner is trained on (Provence,
arXiv:2501.16214, section 3; the answer-and-cite form of prompt, the best in its ablation).
The prompt is ours. Departures: sentences are numbered from 1 and [0] is the title alone, where
Provence's title is simply the first sentence; a reply that both cites and says "No answer" is
rejected as contradictory, where theirs counts as "No answer"; bracketed numbers that stand in
the passage itself (reference marks) are shown in parentheses, so that they cannot be cited.

Replies that cannot be trusted are rejected by name (`REASONS`), never guessed at. Replies are
paid for: work is done in small shards, a finished shard is never asked for again, and over grown
files neither is a row that an earlier table holds (one that was rejected is).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ..errors import RecipeError
from ..storage import Manifest, Store, Table, row_id
from .engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec
from .evaluation_rows import ContextRow, cached_rows, rows_digest
from .openai_client import ChatClient, ChatFailure, ChatReply, Endpoint, Ledger
from .progress import Progress, Silent
from .reuse import RowWise, read_rows

VERSION = 1

SYSTEM = (
    "You are given a question and a context whose sentences are numbered like [3]. Answer the"
    " question in a sentence or two from the context alone, without outside knowledge. After each"
    " statement put the numbers of all sentences that it rests on in square brackets, for example"
    " [2] or [2,5]. Name every sentence that a reader needs to check the answer, and none that"
    " they do not. If the context holds nothing that helps to answer, write exactly: No answer."
    " Write nothing else."
)

#: Why a reply is not used. Counts stand in the manifest's `dropped`, replies in the rejects. (A
#: row that repeats question, title and passage is not asked again; it counts as `duplicate`.)
REASONS: Mapping[str, str] = {
    "empty": "the reply is blank",
    "truncated": "the reply ended at the token limit; its last citations may be missing",
    "filtered": "the endpoint withheld the reply (finish_reason is neither stop nor length)",
    "contradictory": "the reply cites sentences and says that there is no answer",
    "uncited": "the reply cites no sentence",
    "unparsable": "a bracket with digits is not a list of sentence numbers",
    "out_of_range": "a cited number is not a sentence of the context",
    "title_only": "only the title is cited",
    "refused": "the endpoint refused this prompt (400, 413 or 422)",
    "malformed": "the endpoint kept answering with something else than a chat completion",
}

_BRACKET = re.compile(r"[\[【［]([^\[\]【】［］]{0,200})[\]】］]")
_NUMBERS = re.compile(r"\s*\d{1,6}(?:\s*[,;]\s*\d{1,6})*\s*")
_NO_ANSWER = re.compile(r"\bno answer\b", re.IGNORECASE)
_REFERENCE = re.compile(r"\[(\s*\d[\d\s,;]*)\]")


def prompt(row: ContextRow) -> list[dict[str, str]]:
    """The two messages for one row: what to do, and question with numbered sentences."""
    lines = [f"[0] {_plain(row.title)}"] if row.title and row.title.strip() else []
    lines += [f"[{i}] {_plain(text)}" for i, text in enumerate(row.texts, start=1)]
    context = "\n".join(lines)
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Question: {_plain(row.question)}\n\nContext:\n{context}"},
    ]


def _plain(text: str) -> str:
    return _REFERENCE.sub(r"(\1)", " ".join(text.split()))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reply says: the cited sentences (0-based, title excluded), or why it says nothing."""

    cited: tuple[int, ...] = ()
    reason: str | None = None


def parse_reply(text: str, finish_reason: str, *, sentences: int, title: bool) -> Verdict:
    """Read the citations of one reply.

    Parameters
    ----------
    text, finish_reason
        As the endpoint gave them.
    sentences
        How many numbered sentences the context had, the title not counted.
    title
        Whether [0] was shown.

    Returns
    -------
    Verdict
        No citation and no reason: the reply says "No answer".
    """
    if finish_reason == "length":
        return Verdict(reason="truncated")
    if finish_reason != "stop":
        return Verdict(reason="filtered")
    if not text.strip():
        return Verdict(reason="empty")
    groups = [group for group in _BRACKET.findall(text) if any(c.isdigit() for c in group)]
    if _NO_ANSWER.search(text):
        return Verdict(reason="contradictory" if groups else None)
    if not groups:
        return Verdict(reason="uncited")
    if not all(_NUMBERS.fullmatch(group) for group in groups):
        return Verdict(reason="unparsable")
    numbers = {int(number) for group in groups for number in re.findall(r"\d+", group)}
    if max(numbers) > sentences or (0 in numbers and not title):
        return Verdict(reason="out_of_range")
    cited = tuple(sorted(number - 1 for number in numbers if number))
    return Verdict(cited) if cited else Verdict(reason="title_only")


class SilverOptions(StepOptions):
    """Options of `label_silver`. `rows` are files in the format of `evaluation_rows`; labels that
    they hold are not looked at. `shard_rows` is the most that a crash can make you pay twice."""

    paths: ClassVar[tuple[str, ...]] = ("rows",)

    rows: list[str] = Field(min_length=1)
    endpoint: Endpoint
    shard_rows: int = Field(32, ge=1)


SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("passage", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("sentences", pa.list_(pa.list_(pa.int64())), nullable=False),
        pa.field("labels", pa.list_(pa.int8()), nullable=False),
        pa.field("answers", pa.list_(pa.string()), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("teacher_score", pa.float64()),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("requests", pa.int64(), nullable=False),
    ]
)

_SAID = ("labels", "response", "prompt_tokens", "completion_tokens", "requests")
_GIVEN = pa.schema([field for field in SCHEMA if field.name not in _SAID])


def label_rows(
    rows: Sequence[ContextRow], answers: Sequence[ChatReply | ChatFailure]
) -> tuple[pa.Table, list[tuple[dict[str, Any], str]]]:
    """Labelled rows of `SCHEMA`, and the rejected rows, each with the name of its reason."""
    good: list[dict[str, Any]] = []
    bad: list[tuple[dict[str, Any], str]] = []
    for row, answer in zip(rows, answers, strict=True):
        record = _record(row, answer)
        if isinstance(answer, ChatFailure):
            bad.append((record, answer.reason))
            continue
        verdict = parse_reply(
            answer.text,
            answer.finish_reason,
            sentences=len(row.sentences),
            title=bool(row.title and row.title.strip()),
        )
        if verdict.reason is not None:
            bad.append((record | {"finish_reason": answer.finish_reason}, verdict.reason))
            continue
        cited = set(verdict.cited)
        labels = [int(i in cited) for i in range(len(row.sentences))]
        good.append(record | {"labels": labels})
    return pa.Table.from_pylist(good, schema=SCHEMA), bad


def _given_record(row: ContextRow) -> dict[str, Any]:
    return {
        "id": silver_id(row),
        "question": row.question,
        "passage": row.passage,
        "title": row.title,
        "sentences": [list(borders) for borders in row.sentences],
        "answers": list(row.answers),
        "group": row.group,
        "teacher_score": row.teacher_score,
    }


def _record(row: ContextRow, answer: ChatReply | ChatFailure) -> dict[str, Any]:
    reply = answer if isinstance(answer, ChatReply) else None
    return _given_record(row) | {
        "response": answer.text if isinstance(answer, ChatReply) else answer.detail,
        "prompt_tokens": reply.prompt_tokens if reply else None,
        "completion_tokens": reply.completion_tokens if reply else None,
        "requests": answer.requests,
    }


def silver_id(row: ContextRow) -> int:
    """Id of a labelled row: the hash of question, title and passage."""
    return row_id(row.question, row.title or "", row.passage)


@lru_cache(maxsize=2)
def _client(endpoint: str) -> ChatClient:
    # One ledger a process, so that `max_cost` spans the shards.
    return ChatClient(Endpoint.model_validate_json(endpoint))


def _plan(options: SilverOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    rows = cached_rows(options.rows)
    _client.cache_clear()
    endpoint = options.endpoint
    return Plan(
        schema=SCHEMA,
        shards=-(-len(rows) // options.shard_rows),
        identity={
            "rows": rows_digest(rows),
            "shard_rows": options.shard_rows,
            "system": SYSTEM,
            "endpoint": endpoint.model_dump(
                include={"base_url", "model", "temperature", "max_tokens", "seed", "extra"}
            ),
        },
        payload=len(rows),
        notes={"reasons": dict(REASONS)},
    )


def _shard(job: Job, shard: int, out: Rows) -> None:
    repeated = len(_chosen(job, shard)) - len(_fresh(job, shard))
    out.count(0, {"duplicate": repeated} if repeated else {})
    _ROWS.make(job, shard, out)


def _chosen(job: Job, shard: int) -> range:
    options = _options(job)
    first = shard * options.shard_rows
    return range(first, min(first + options.shard_rows, len(cached_rows(options.rows))))


def _fresh(job: Job, shard: int) -> list[ContextRow]:
    """Rows of a shard that repeat none before them."""
    rows = cached_rows(_options(job).rows)
    places = _first_places(rows)
    return [rows[i] for i in _chosen(job, shard) if places[silver_id(rows[i])] == i]


def _options(job: Job) -> SilverOptions:
    if not isinstance(job.options, SilverOptions):
        kind = type(job.options).__name__
        raise RecipeError(f"`label_silver` needs SilverOptions; found {kind}.")
    return job.options


def _given(job: Job, shard: int) -> Iterator[pa.Table]:
    records = [_given_record(row) for row in _fresh(job, shard)]
    if records:
        yield pa.Table.from_pylist(records, schema=_GIVEN)


def _found(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    # Files leave no table; what was given stands beside what was said of it.
    return read_rows(job.output(), ids, _GIVEN.names)


def _ask(job: Job, given: pa.Table, out: Rows) -> None:
    rows = [
        ContextRow(
            question=one["question"],
            passage=one["passage"],
            title=one["title"],
            sentences=tuple((start, end) for start, end in one["sentences"]),
            answers=tuple(one["answers"]),
            group=one["group"],
            teacher_score=one["teacher_score"],
        )
        for one in given.to_pylist()
    ]
    client = _client(_options(job).endpoint.model_dump_json())
    table, bad = label_rows(rows, client.ask_all([prompt(row) for row in rows]))
    out.write(table)
    for record, reason in bad:
        out.reject(record, REASONS[reason], where=reason)
    out.count(table.num_rows, Counter(reason for _, reason in bad))


def _first_places(rows: Sequence[ContextRow]) -> dict[int, int]:
    places: dict[int, int] = {}
    for i, row in enumerate(rows):
        places.setdefault(silver_id(row), i)
    return places


_ROWS = RowWise((), _given, _found, _ask, ignored=frozenset({"rows", "shard_rows"}))
SILVER = StepSpec(
    name="label_silver",
    version=VERSION,
    options=SilverOptions,
    inputs={},
    plan=_plan,
    shard=_shard,
    row_wise=_ROWS,
    about="Ask a language model to answer with cited sentences; its citations become labels.",
)


def label_silver(
    options: SilverOptions,
    store: Store,
    *,
    name: str = "silver",
    bad_rows: float = 0.5,
    progress: Progress | None = None,
) -> Manifest:
    """Label rows and commit them as a table that training reads; run again to resume.

    Parameters
    ----------
    options
        Rows, endpoint and shard size.
    store
        Where the table goes; rejected rows stand in its rejects with reply and reason.
    bad_rows
        Share of rows that may be rejected. Models fail to cite in about a tenth of replies, so
        unlike other steps this one starts with room for it.

    Raises
    ------
    InputError
        A row is not readable, the endpoint refuses key or model, or too many replies are bad.
    ModelError, BudgetError
        The endpoint stays away, or `max_cost` is spent; finished shards are kept.
    """
    context = StepContext(store=store, name=name, bad_rows=bad_rows, progress=progress or Silent())
    return SILVER(options, {}, context)


def silver_costs(table: Table) -> Ledger:
    """What a finished table cost in all its runs: kept and rejected replies together, those of
    rows that it took over from an earlier table included."""
    ledger = Ledger()
    rejected = [json.loads(text) for text in table.rejects().column("row").to_pylist()]
    columns = ["prompt_tokens", "completion_tokens", "requests"]
    for record in [*table.to_table(columns=columns).to_pylist(), *rejected]:
        ledger.requests += record["requests"]
        ledger.retries += record["requests"] - 1
        tokens = record["prompt_tokens"], record["completion_tokens"]
        ledger.add(ChatReply("", "", *tokens, record["requests"]))
    return ledger
