"""Step `context_scores`: what one method thinks of each sentence of labelled rows.

One table a method, so that a new model leaves the baselines' tables as they are; the figures of
`evaluate_context` are made from these tables alone. Beside the rows as given, some questions are
paired with a passage of another question (`other` in the table): of those everything should go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ..errors import RecipeError
from ..pruners.contract import Signals
from ..pruners.rules import uniform
from ..storage import Table, row_id, row_ids
from . import models
from .answers import holds_answer
from .engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec, use_threads
from .evaluation_rows import ContextRow, Stamps, cached_rows, rows_digest, stamps

Floats = npt.NDArray[np.float32]
MethodName = Literal[
    "provence", "cosine", "lexrank", "lexrank_threshold", "dslr", "first_k", "random"
]
METHOD_NAMES: tuple[MethodName, ...] = (
    "provence",
    "cosine",
    "lexrank",
    "lexrank_threshold",
    "dslr",
    "first_k",
    "random",
)
#: Methods whose score is a probability, so that a threshold and calibration mean something.
PROBABILITIES = frozenset({"provence"})


class RowOptions(StepOptions):
    """Which rows are scored, and by which models.

    Attributes
    ----------
    rows
        Files of labelled rows (`evaluation_rows`).
    model
        A Provence network: "default", a folder, or a hub id. `dslr` uses its ranking head on
        (question, sentence alone).
    dtype
        Of the network's encoder. float32 gives the same scores on every machine;
        `ContextPruner` takes bfloat16 where the processor has it, measured by "bfloat16" here.
    encoder
        Sentence encoder of `cosine`.
    other_pairs
        How many questions are paired with a passage of another question as well.
    shard_rows
        Rows scored at once; a crash costs at most that many again.
    """

    paths: ClassVar[tuple[str, ...]] = ("rows",)

    rows: list[str] = Field(min_length=1)
    model: str = "default"
    dtype: Literal["float32", "bfloat16"] = "float32"
    encoder: str = "all-MiniLM-L6-v2"
    other_pairs: int = Field(500, ge=0)
    shard_rows: int = Field(256, ge=1)


class ScoreOptions(RowOptions):
    """The rows, and the `method` that scores them."""

    method: MethodName


SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("chars", pa.int64(), nullable=False),
        pa.field("other", pa.bool_(), nullable=False),
        # Higher = kept longer.
        pa.field("score", pa.float32(), nullable=False),
        # Of the passage, on each of its sentences; null where the method ranks no passages.
        pa.field("rank", pa.float32()),
    ]
)


def other_pairs(rows: Sequence[ContextRow], count: int, seed: int) -> list[ContextRow]:
    """Up to `count` questions, each with a passage of another group that holds no answer of it.

    Drawn by hashes of (seed, group), so that neither order nor shards matter; one pair a group.
    Passages are taken in turn from the groups next in that order; a group for which the next
    twenty do not serve (same passage or title, or the answer occurs) gets none.
    """
    first: dict[str, ContextRow] = {}
    for row in rows:
        first.setdefault(row.group, row)
    groups = sorted(first)
    order = np.argsort(uniform(seed, row_ids(groups)), kind="stable")
    ring = [first[groups[i]] for i in order]
    made = []
    for i, row in enumerate(ring[:count]):
        for step in range(1, min(21, len(ring))):
            passage = ring[(i + step) % len(ring)]
            if _strange(row, passage):
                made.append(_paired(row, passage))
                break
    return made


def _strange(row: ContextRow, passage: ContextRow) -> bool:
    same = row.passage == passage.passage or (row.title and row.title == passage.title)
    return not same and not holds_answer(passage.passage, row.answers)


def _paired(row: ContextRow, passage: ContextRow) -> ContextRow:
    return replace(
        passage,
        question=row.question,
        group=row.group,
        answers=row.answers,
        labels=(0,) * len(passage.sentences),
        relevant=0,
    )


@dataclass(frozen=True)
class Scored:
    """What one method gave for some rows.

    `sentence` (N,) float32 over all sentences in order, higher = kept longer; `passage` (P,)
    float32, higher = ranked earlier, or None where the method does not rank.
    """

    sentence: Floats
    passage: Floats | None = None


@dataclass(frozen=True)
class Ground:
    """What methods are given.

    `rows` are scored, `ids` (N,) int64 of their sentences; `first_sentence` is the place of the
    first one among the sentences of all rows, over which `terms` counts document frequencies.
    """

    rows: Sequence[ContextRow]
    ids: npt.NDArray[np.int64]
    options: ScoreOptions
    seed: int
    first_sentence: int
    terms: Callable[[], Signals]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(P,) int64, sentences of each row."""
        return np.array([len(row.sentences) for row in self.rows], np.int64)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """(N,) int64, place of each sentence in its passage."""
        return np.concatenate([np.arange(n) for n in self.sizes]).astype(np.int64)

    @property
    def texts(self) -> list[str]:
        """(N,) sentences."""
        return [text for row in self.rows for text in row.texts]


def _provence(ground: Ground) -> Scored:
    from ..pruners.signals.context import context_signals

    signals = context_signals(
        _network(ground.options.model, ground.options.dtype),
        [row.question for row in ground.rows],
        [[row.passage] for row in ground.rows],
        [[row.title] for row in ground.rows],
        sentences=[[row.sentences] for row in ground.rows],
    )
    return Scored(signals.keep_probability, signals.relevance_logit)


def _dslr(ground: Ground) -> Scored:
    from ..pruners.signals.context import context_signals

    signals = context_signals(
        _network(ground.options.model, ground.options.dtype),
        [row.question for row in ground.rows],
        [row.texts for row in ground.rows],
        [[row.title] * len(row.sentences) for row in ground.rows],
        sentences=[[((0, len(text)),) for text in row.texts] for row in ground.rows],
    )
    return Scored(signals.relevance_logit)


def _cosine(ground: Ground) -> Scored:
    from ..pruners.signals.similarity import question_similarity

    encoder = models.sentence_encoder(str(models.encoder(ground.options.encoder).path))
    of_row = np.arange(len(ground.rows))
    texts = [*ground.texts, *(row.passage for row in ground.rows)]
    asked = np.concatenate([np.repeat(of_row, ground.sizes), of_row])
    found = question_similarity(encoder, [row.question for row in ground.rows], texts, asked)
    return Scored(found[: -len(of_row)], found[-len(of_row) :])


def _lexrank(ground: Ground, threshold: float | None = None) -> Scored:
    from ..pruners.context.lexrank import LexRank

    passage = np.repeat(np.arange(len(ground.rows)), ground.sizes)
    rows = np.arange(len(passage)) + ground.first_sentence
    arrays = ground.terms().take(rows)
    signals = Signals({**arrays, "id": ground.ids, "passage": passage})
    return Scored(LexRank(threshold=threshold)(signals, seed=ground.seed).score)


def _first_k(ground: Ground) -> Scored:
    return Scored(-ground.positions.astype(np.float32))


def _random(ground: Ground) -> Scored:
    rows = np.array([row_id("passage", *_identity(row)) for row in ground.rows], np.int64)
    return Scored(
        uniform(ground.seed, ground.ids).astype(np.float32),
        uniform(ground.seed, rows).astype(np.float32),
    )


SCORERS: Mapping[MethodName, Callable[[Ground], Scored]] = {
    "provence": _provence,
    "cosine": _cosine,
    "lexrank": _lexrank,
    "lexrank_threshold": partial(_lexrank, threshold=0.1),
    "dslr": _dslr,
    "first_k": _first_k,
    "random": _random,
}


@lru_cache(maxsize=1)
def _network(name: str, dtype: str) -> Any:
    from ..pruners.signals.context import Scorer

    return Scorer.of(
        models.provence(name, dtype=dtype)
    )  # the tokenizer's copy is kept between shards


def _identity(row: ContextRow) -> tuple[str, str, str, str]:
    return row.group, row.question, row.title or "", row.passage


@dataclass(frozen=True)
class Corpus:
    """All rows to score: those given, then the pairs with another question's passage."""

    rows: Sequence[ContextRow]
    given: int

    @property
    def borders(self) -> npt.NDArray[np.int64]:
        """(rows + 1,) int64, place of each row's first sentence among all sentences."""
        sizes = [len(row.sentences) for row in self.rows]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _corpus(options: ScoreOptions, seed: int) -> Corpus:
    return _read_corpus(stamps(options.rows), options.other_pairs, seed)


@lru_cache(maxsize=2)
def _read_corpus(of: Stamps, pairs: int, seed: int) -> Corpus:
    rows = cached_rows([path for path, _, _ in of])
    return Corpus([*rows, *other_pairs(rows, pairs, seed)], len(rows))


@lru_cache(maxsize=1)
def _terms(of: Stamps, pairs: int, seed: int) -> Signals:
    from ..pruners.signals.terms import term_signals

    texts = [text for row in _read_corpus(of, pairs, seed).rows for text in row.texts]
    return Signals({"id": np.arange(len(texts)), **term_signals(texts)})


def _plan(options: ScoreOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    corpus = _corpus(options, context.seed)
    rows, given = corpus.rows, corpus.given
    found: dict[str, str] = {}
    notes: dict[str, Any] = {"rows": given, "other": len(rows) - given}
    identity: dict[str, Any] = {
        "rows": rows_digest(rows[:given]),
        "method": options.method,
        "other_pairs": options.other_pairs,
        "shard_rows": options.shard_rows,
    }
    if options.method in ("provence", "dslr"):
        loaded = models.provence(options.model, dtype=options.dtype)
        identity["dtype"] = options.dtype
        found["provence"] = loaded.digest
        notes |= {
            "name": options.model,
            "threshold": loaded.config.threshold,
            "licence": loaded.config.licence,
        }
    elif options.method == "cosine":
        found["encoder"] = models.encoder(options.encoder).sha256
        notes["name"] = options.encoder
    return Plan(
        schema=SCHEMA,
        shards=-(-len(rows) // options.shard_rows),
        identity=identity,
        models=found,
        notes=notes,
    )


def _shard(job: Job, shard: int, out: Rows) -> None:
    options = job.options
    if not isinstance(options, ScoreOptions):
        raise RecipeError(f"`context_scores` got {type(options).__name__} as its options.")
    use_threads(job.threads)
    first = shard * options.shard_rows
    out.write(score_rows(_corpus(options, job.seed), first, options, job.seed))


def score_rows(corpus: Corpus, first: int, options: ScoreOptions, seed: int) -> pa.Table:
    """A table of `SCHEMA` for the `shard_rows` rows of a corpus from number `first`."""
    rows = corpus.rows[first : first + options.shard_rows]
    sizes = np.array([len(row.sentences) for row in rows], np.int64)
    number = np.repeat(np.arange(first, first + len(rows)), sizes)
    ids = [
        row_id(*_identity(row), i, place)
        for i, row in enumerate(rows, start=first)
        for place in range(len(row.sentences))
    ]
    ground = Ground(
        rows=rows,
        ids=np.array(ids, np.int64),
        options=options,
        seed=seed,
        first_sentence=int(corpus.borders[first]),
        terms=lambda: _terms(stamps(options.rows), options.other_pairs, seed),
    )
    scored = SCORERS[options.method](ground)
    ranks = None if scored.passage is None else np.repeat(scored.passage, sizes)
    columns = {
        "id": ground.ids,
        "row": number,
        "position": ground.positions,
        "chars": [end - start for row in rows for start, end in row.sentences],
        "other": number >= corpus.given,
        "score": scored.sentence,
        "rank": pa.nulls(len(ids), pa.float32()) if ranks is None else ranks,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


SCORES = StepSpec(
    name="context_scores",
    version=1,
    options=ScoreOptions,
    inputs={},
    plan=_plan,
    shard=_shard,
    about="What one method of context pruning thinks of each sentence of labelled rows.",
)
