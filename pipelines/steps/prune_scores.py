"""Step `prune_scores`: which rows of a table of scores stay, however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from ...errors import InputError
from ...pruners.contract import FloatArray, IntArray, Selection
from ...storage import Table
from ..decisions import SCHEMA, decision_table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from ..streamed import StreamedCcs, TopFraction, ccs_streamed, top_fraction_streamed

_ROWS_A_BATCH = 131_072
# Steps whose tables have an id and a score. From Python any such table will do.
_SCORED = (
    "import_scores",
    "knn_shapley",
    "cluster_rows",
    "prune_dataset",
    "token_signals",
    "prune_sft",
    "prune_passages",
    "prune_scores",
)


class PruneScoresOptions(StepOptions):
    """Options of `prune_scores`.

    Attributes
    ----------
    column
        A float32 column of the table.
    method
        top_fraction: the rows at one end. ccs: equal shares of strata of difficulty, the hardest
        rows cut first (`pruners.sample.ccs`); its score column is a difficulty.
    keep
        Fraction of the rows to keep; exactly ceil(keep * N).
    order
        "high": high scores are kept (ccs: are hard). "low": low ones.
    cutoff, strata
        Of ccs: share of the hardest rows that is cut (default 0.1), and how many strata (50).
    """

    column: str = "score"
    method: Literal["top_fraction", "ccs"] = "top_fraction"
    keep: float = Field(default=0.5, ge=0.0, le=1.0)
    order: Literal["high", "low"] = "high"
    cutoff: float | None = Field(default=None, ge=0.0, le=1.0)
    strata: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _own_options(self) -> PruneScoresOptions:
        if self.method != "ccs" and (self.cutoff is not None or self.strata is not None):
            raise ValueError("`cutoff` and `strata` belong to the method ccs: leave them out")
        return self


def plan(options: PruneScoresOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard for each shard of the scores; the rule is found when the first is decided."""
    scores = inputs["scores"]
    floats = [field.name for field in scores.schema if field.type == pa.float32()]
    if options.column not in scores.schema.names:
        raise InputError(
            f"`{scores.manifest.name}`: found no column `{options.column}`; float32 columns are"
            f" {', '.join(floats) or 'none'}. Set `column`."
        )
    if options.column not in floats:
        raise InputError(
            f"`{scores.manifest.name}`: expected a float32 column among"
            f" {', '.join(floats) or 'none'}; found `{options.column}` of"
            f" {scores.schema.field(options.column).type}. Set `column`."
        )
    shards = scores.shards()
    return Plan(SCHEMA, len(shards), options.model_dump(), payload=shards)


_RULES: dict[str, TopFraction | StreamedCcs] = {}


def _rule(job: Job) -> TopFraction | StreamedCcs:
    """The rule of a job, found once a process: its passes read the whole table."""
    if job.key not in _RULES:
        options: PruneScoresOptions = job.options  # type: ignore[assignment]
        table = job.input("scores")

        def batches() -> Iterator[tuple[IntArray, FloatArray]]:
            for batch in table.batches(["id", options.column], _ROWS_A_BATCH):
                yield _scores(batch, options)

        _RULES.clear()
        _RULES[job.key] = (
            top_fraction_streamed(batches, options.keep)
            if options.method == "top_fraction"
            else ccs_streamed(
                batches,
                options.keep,
                cutoff=0.1 if options.cutoff is None else options.cutoff,
                strata=options.strata or 50,
                seed=job.seed,
            )
        )
    return _RULES[job.key]


def _scores(batch: pa.RecordBatch, options: PruneScoresOptions) -> tuple[IntArray, FloatArray]:
    ids = batch.column("id").to_numpy()
    column = batch.column(options.column)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(
            f"column `{options.column}`: row {ids[row]} holds no score. Repair or reject that row"
            " before pruning."
        )
    scores = column.to_numpy()
    return ids, scores if options.order == "high" else -scores


def decided_rows(job: Job, index: int) -> Iterator[tuple[IntArray, Selection]]:
    """(ids, decision) of the batches of one shard of scores, in order."""
    options: PruneScoresOptions = job.options  # type: ignore[assignment]
    rule = _rule(job)
    number = job.plan.payload[index]
    batches = job.input("scores").shard_batches(number, ["id", options.column], _ROWS_A_BATCH)
    for batch in batches:
        ids, scores = _scores(batch, options)
        yield ids, rule.decide(ids, scores)


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about the rows of one shard, a batch at a time."""
    for ids, selection in decided_rows(job, index):
        out.write(decision_table(ids, selection))
        out.count(selection.kept, selection.dropped())


SPEC = StepSpec(
    name="prune_scores",
    version=1,
    options=PruneScoresOptions,
    inputs={"scores": Slot(_SCORED)},
    plan=plan,
    shard=shard,
    about="Which rows of a table of scores stay, in bounded memory.",
)
