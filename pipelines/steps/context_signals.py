"""Step `context_signals`: what models say about each sentence of the retrieved passages.

The expensive part of context pruning, done once; any budget or method decides from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...pruners.signals.context import context_signals
from ...pruners.signals.similarity import (
    ProvenceScorer,
    cross_encoder_logit,
    question_similarity,
)
from ...pruners.signals.terms import term_signals
from ...storage import Table, row_ids
from ..bundles import shard_of
from ..chunking import token_counter
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import encoder, provence, sentence_encoder
from ..reuse import RowWise
from ..tables import rows_by_id, spans_of_equal

Signal = Literal["provence", "vote", "cosine", "terms", "cross_encoder"]
_BASE = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("question", pa.int64(), nullable=False),
    # Id of the retrieved row, so that a passage found for two questions is two groups.
    pa.field("passage", pa.int64(), nullable=False),
    pa.field("chunk", pa.int64(), nullable=False),
    pa.field("position", pa.int64(), nullable=False),
    pa.field("start", pa.int32(), nullable=False),
    pa.field("end", pa.int32(), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),
]
_COLUMNS: dict[str, list[pa.Field]] = {
    "provence": [
        pa.field("keep_probability", pa.float32(), nullable=False),
        pa.field("relevance_logit", pa.float32(), nullable=False),
    ],
    "vote": [pa.field("token_keep_probability", pa.list_(pa.float32()), nullable=False)],
    "cosine": [pa.field("question_similarity", pa.float32(), nullable=False)],
    "terms": [
        pa.field("term", pa.list_(pa.int64()), nullable=False),
        pa.field("term_weight", pa.list_(pa.float32()), nullable=False),
    ],
    "cross_encoder": [pa.field("cross_encoder_logit", pa.float32(), nullable=False)],
}
_OF_NETWORK = ("provence", "vote", "cross_encoder")


class ContextSignalsOptions(StepOptions):
    """Options of `context_signals`.

    Attributes
    ----------
    signals
        Which to compute. `provence`: keep probability of a sentence and relevance of its
        passage, one forward pass for both; `vote`: the tokens' probabilities as well, which
        the aggregation "vote" needs. `cosine`: similarity of question and sentence. `terms`:
        tf * idf over a question's passages, for lexrank. `cross_encoder`: the network's
        ranking score of each sentence alone, for dslr.
    model
        The Provence network: `default`, a folder, or a hub id.
    encoder
        For `cosine`, and whose tokens are counted.
    title
        Show the passage's title to the network, ahead of the passage.
    questions_a_shard
        Questions whose passages go through the model together.
    device, dtype
        Of the network. `dtype` changes numbers, so it enters the key and is not chosen by what
        the machine can do: bfloat16 is about twice as fast where the processor has it.
    """

    signals: list[Signal] = Field(default=["provence", "cosine"], min_length=1)
    model: str = "default"
    encoder: str = "all-MiniLM-L6-v2"
    title: bool = True
    questions_a_shard: int = Field(default=16, ge=1, le=4096)
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Passages:
    """Retrieved passages with what is known of them: R rows, and the S sentences in them.

    `retrieved` rows hold `id`, `question` and `passage` (ids), `asked`, `title` and `text`.
    """

    retrieved: list[dict[str, Any]]
    spans: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, rows: pa.Table) -> Passages:
        """From rows as `read` gives them."""
        found = rows.to_pylist()
        ends = [row["sentence_ends"] for row in found]
        return cls(found, [list(zip([0, *own[:-1]], own, strict=True)) for own in ends])

    @property
    def asked(self) -> list[str]:
        """(R,) question of each passage."""
        return [row["asked"] for row in self.retrieved]

    @property
    def texts(self) -> list[str]:
        """(R,) text of each passage."""
        return [row["text"] for row in self.retrieved]

    @property
    def titles(self) -> list[str]:
        """(R,) title of each passage, or ""."""
        return [row["title"] for row in self.retrieved]

    @property
    def owner(self) -> npt.NDArray[np.int64]:
        """(S,) number of the passage that each sentence stands in."""
        return np.repeat(np.arange(len(self.spans)), [len(found) for found in self.spans])

    @property
    def sentences(self) -> list[str]:
        """(S,) text of each sentence, without the white space around it."""
        return [
            text[start:end].strip()
            for text, spans in zip(self.texts, self.spans, strict=True)
            for start, end in spans
        ]


def plan(options: ContextSignalsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each few questions, which are never cut apart."""
    models = {"encoder": encoder(options.encoder).sha256}
    notes: dict[str, Any] = {"encoder": options.encoder}
    if set(_OF_NETWORK) & set(options.signals):
        loaded = provence(options.model, options.device, options.dtype)
        models["provence"] = loaded.digest
        config = loaded.config
        notes |= {
            "model": options.model,
            "threshold": config.threshold,
            "aggregation": config.aggregation,
        }
    ranges = _ranges(inputs["retrieved"], options.questions_a_shard)
    wanted = [field for name in _COLUMNS if name in options.signals for field in _COLUMNS[name]]
    identity = options.model_dump(exclude={"device", "model", "encoder"})
    identity["signals"] = sorted(options.signals)
    return Plan(
        pa.schema([*_BASE, *wanted]), len(ranges), identity, models, payload=ranges, notes=notes
    )


def _ranges(retrieved: Table, questions: int) -> list[tuple[int, int, int]]:
    """(shard of `retrieved`, first row, last row + 1) of each group of questions."""
    made: list[tuple[int, int, int]] = []
    for number in retrieved.shards():
        asked = shard_of(retrieved, number, ["question"]).column("question").to_numpy()
        spans = list(spans_of_equal(asked))
        for first in range(0, len(spans), questions):
            group = spans[first : first + questions]
            made.append((number, group[0][0], group[-1][1]))
    return made


def read(job: Job, index: int) -> Iterator[pa.Table]:
    """Some questions' passages."""
    number, start, stop = job.plan.payload[index]
    yield _joined(job, shard_of(job.input("retrieved"), number).slice(start, stop - start))


def find(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Retrieved passages with these ids."""
    return _joined(job, job.input("retrieved").lookup(ids, missing="skip"))


def _joined(job: Job, retrieved: pa.Table) -> pa.Table:
    """Retrieved rows with all that their signals depend on."""
    made = retrieved.select(["id", "question", "passage"])
    asked, passages = (made.column(name).to_pylist() for name in ("question", "passage"))
    questions = rows_by_id(job.input("questions"), asked, ["question"])
    columns = ["text", "title", "sentence_ends"]
    chunks = rows_by_id(job.input("chunks"), passages, columns)
    made = made.append_column(
        "asked", pa.array([questions[q]["question"] for q in asked], pa.string())
    )
    for name in columns:
        kind = job.input("chunks").schema.field(name).type
        made = made.append_column(name, pa.array([chunks[p][name] for p in passages], kind))
    options: ContextSignalsOptions = job.options  # type: ignore[assignment]
    if "terms" in options.signals:
        company = _company(job.input("retrieved"))
        kind = pa.list_(pa.int64())
        made = made.append_column("company", pa.array([company[q] for q in asked], kind))
    return made


@lru_cache(maxsize=4)
def _company(retrieved: Table) -> dict[int, list[int]]:
    """Question to its passages: the corpus that the weights of its terms are counted over."""
    made: dict[int, list[int]] = {}
    for batch in retrieved.batches(columns=["question", "passage"]):
        columns = (batch.column(name).to_pylist() for name in ("question", "passage"))
        for question, passage in zip(*columns, strict=True):
            made.setdefault(question, []).append(passage)
    return made


def _together(options: ContextSignalsOptions) -> str | None:
    """Weights of terms depend on the question's other passages."""
    return "question" if "terms" in options.signals else None


def score(job: Job, rows: pa.Table, out: Rows) -> None:
    """Run the models over the sentences of some passages."""
    options: ContextSignalsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    passages = Passages.of(rows)
    columns = _base_columns(passages, str(encoder(options.encoder).path))
    if {"provence", "vote"} & set(options.signals):
        columns |= _provence(passages, options)
    if "cosine" in options.signals:
        model = sentence_encoder(str(encoder(options.encoder).path), options.device)
        columns["question_similarity"] = question_similarity(
            model, passages.asked, passages.sentences, passages.owner
        )
    if "cross_encoder" in options.signals:
        scorer = ProvenceScorer(provence(options.model, options.device, options.dtype))
        columns["cross_encoder_logit"] = cross_encoder_logit(
            scorer, passages.asked, passages.sentences, passages.owner
        )
    if "terms" in options.signals:
        columns |= _terms(passages)
    schema = job.plan.schema
    out.write(pa.table([columns[name] for name in schema.names], schema=schema))
    out.count(len(columns["id"]), {})


def _base_columns(passages: Passages, tokenizer: str) -> dict[str, Any]:
    rows, spans = passages.retrieved, passages.spans
    counts = np.array([len(found) for found in spans], np.int64)
    passage = np.repeat(np.array([row["id"] for row in rows], np.int64), counts)
    starts = np.array([start for found in spans for start, _ in found], np.int32)
    ends = np.array([end for found in spans for _, end in found], np.int32)
    tokens = token_counter(tokenizer).offsets(passages.sentences)
    return {
        "id": row_ids(passage.tolist(), starts.tolist(), ends.tolist()),
        "question": np.repeat(np.array([row["question"] for row in rows], np.int64), counts),
        "passage": passage,
        "chunk": np.repeat(np.array([row["passage"] for row in rows], np.int64), counts),
        "position": np.array([i for found in spans for i in range(len(found))], np.int64),
        "start": starts,
        "end": ends,
        "tokens": np.array([len(found) for found in tokens], np.int64),
    }


def _provence(passages: Passages, options: ContextSignalsOptions) -> dict[str, Any]:
    """Keep probability of each sentence, of its tokens, and ranking logit of its passage."""
    loaded = provence(options.model, options.device, options.dtype)
    rows = range(len(passages.retrieved))
    made = context_signals(
        loaded,
        passages.asked,
        [[text] for text in passages.texts],
        [[title or None] for title in passages.titles] if options.title else None,
        sentences=[[passages.spans[row]] for row in rows],
    )
    borders = made.packed.token_offset.astype(np.int32)
    return {
        "keep_probability": made.keep_probability,
        "relevance_logit": made.relevance_logit[made.passage],
        "token_keep_probability": pa.ListArray.from_arrays(borders, made.token_keep_probability),
    }


def _terms(passages: Passages) -> dict[str, pa.Array]:
    """Terms of each sentence; the passages of one question are the corpus of its idf."""
    asked = np.array([row["question"] for row in passages.retrieved], np.int64)
    counts = np.cumsum([0, *(len(found) for found in passages.spans)])
    sentences = passages.sentences
    parts: dict[str, list[pa.Array]] = {"term": [], "term_weight": []}
    for first, last in spans_of_equal(asked):
        made = term_signals(sentences[counts[first] : counts[last]])
        borders = made["term_offset"].astype(np.int32)
        for name, found in parts.items():
            found.append(pa.ListArray.from_arrays(borders, pa.array(made[name])))
    return {name: pa.concat_arrays(found) for name, found in parts.items()}


ROWS = RowWise(
    # A question or a chunk that is gone, or new, matters only to the rows that name it.
    ("retrieved", "questions", "chunks"),
    read,
    find,
    score,
    owner="passage",
    group=_together,
)
SPEC = StepSpec(
    name="context_signals",
    version=1,
    options=ContextSignalsOptions,
    inputs={
        "retrieved": Slot(("retrieve",)),
        "questions": Slot(("questions",)),
        "chunks": Slot(("chunk",)),
    },
    plan=plan,
    shard=ROWS.make,
    row_wise=ROWS,
    about="What models say about each sentence of the retrieved passages.",
)
