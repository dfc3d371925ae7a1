"""Step `neighbours`: the nearest other rows of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...storage import Table, TableWriter, VectorIndex
from ..dataset_tables import neighbours
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..vector_rows import (
    Floats,
    Ints,
    check_vectors,
    nearest_others,
    row_numbers,
    training_ids,
    unit_batches,
)


class NeighboursOptions(StepOptions):
    """Options of `neighbours`.

    Attributes
    ----------
    k
        Neighbours a row; -1 and distance 0 fill up where there are fewer other rows.
    kind
        Index they are sought with: flat (exact, N^2 d multiply-adds), hnsw, ivf,pq; auto
        chooses by the number of vectors and is exact up to a million.
    """

    k: int = Field(default=10, ge=1, le=1000)
    kind: Literal["auto", "flat", "hnsw", "ivf,pq"] = "auto"


def plan(options: NeighboursOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: one index serves all. Shards follow the vectors'."""
    check_vectors(inputs["vectors"])
    return Plan(neighbours(options.k), None, options.model_dump())


def finish(job: Job, writer: TableWriter) -> None:
    """Build an index of all rows and ask it for each."""
    options: NeighboursOptions = job.options  # type: ignore[assignment]
    vectors = job.input("vectors")
    only = training_ids(job.input("data")) if job.has("data") else None
    shards = vectors.shards()
    pending = writer.pending(len(shards))
    if not pending:
        return
    index = None
    if len(row_numbers(vectors, only)):
        index = VectorIndex.build(
            unit_batches(vectors, only),
            kind=options.kind,
            metric="l2",
            seed=job.seed,
            threads=job.threads,
        )
    for number in pending:
        with writer.shard(number) as out:
            kept = 0
            if index is not None:
                for ids, rows in unit_batches(vectors, only, shard=shards[number]):
                    out.write(_rows(job, index, ids, rows))
                    kept += len(ids)
            out.count(kept=kept, dropped={})


def _rows(job: Job, index: VectorIndex, ids: Ints, rows: Floats) -> pa.Table:
    k = job.options.k  # type: ignore[attr-defined]
    found, squares = nearest_others(index, ids, rows, k, threads=job.threads)
    away = np.where(found < 0, 0.0, np.sqrt(np.maximum(squares, 0.0))).astype(np.float32)
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), k) for column in (found, away)
    ]
    return pa.Table.from_arrays(
        [pa.array(ids), *lists], names=["id", "neighbour", "neighbour_distance"]
    ).cast(neighbours(k))


SPEC = StepSpec(
    name="neighbours",
    version=1,
    options=NeighboursOptions,
    inputs={
        "vectors": Slot(("teacher_outputs", "embed")),
        "data": Slot(("read_dataset",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="The nearest other rows of each row; with `data`, among the training rows alone.",
)
