"""Step `knn_shapley`: what each training row adds to a k-nearest-neighbour classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...errors import InputError
from ...pruners.signals.shapley import knn_shapley
from ...storage import Table, TableWriter, VectorIndex
from ..dataset_tables import SHAPLEY, TEST, TRAIN
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..vector_rows import (
    Floats,
    Ints,
    check_vectors,
    nearest_others,
    refuse_repeats,
    row_numbers,
    unit_batches,
)

# Neighbours held at once: a few arrays of so many float64.
_CELLS = 1 << 22


class KnnShapleyOptions(StepOptions):
    """Options of `knn_shapley`.

    Attributes
    ----------
    k
        Neighbours of the classifier that rows are valued for.
    depth
        Neighbours looked at for each validation row, K* of the truncated form: rows beyond
        count 0 and no value is off by more than 1 / depth. None takes 10 k. As many as there
        are training rows gives exact values.
    tail
        What the last row looked at starts from. "share": what it is worth if labels beyond are
        right as often as all the others of the table are. "zero": 0, as published; rows in a
        neighbourhood of one label then get 0.
    validation
        "test": rows are valued by the test split. "self": by each other, none by itself,
        which takes N^2 d multiply-adds with an exact index.
    kind
        Index that neighbours are sought with; flat and auto up to a million rows are exact.
    """

    k: int = Field(default=10, ge=1, le=10_000)
    depth: int | None = Field(default=None, ge=1)
    tail: Literal["share", "zero"] = "share"
    validation: Literal["test", "self"] = "test"
    kind: Literal["auto", "flat", "hnsw", "ivf,pq"] = "auto"


@dataclass(frozen=True)
class _Labels:
    """Ids of a split in ascending order, and the label of each."""

    ids: Ints
    label: Ints

    def of(self, ids: Ints) -> Ints:
        """Labels of ids of any shape."""
        return np.asarray(self.label[np.searchsorted(self.ids, ids)], np.int64)


class _Shares:
    """How often the labels of rows that were not looked at are right."""

    def __init__(self, label: Ints, alone: bool) -> None:
        self._values, self._counts = np.unique(label, return_counts=True)
        self._alone = int(alone)  # a row that asks is not its own candidate
        self._candidates = len(label) - self._alone

    def beyond(self, label: Ints, agree: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """For the labels (Q,) of validation rows and what was seen (Q, K*): shares (Q,)."""
        place = np.minimum(np.searchsorted(self._values, label), len(self._values) - 1)
        right = np.where(self._values[place] == label, self._counts[place] - self._alone, 0)
        left = max(1, self._candidates - agree.shape[1])
        return np.asarray((right - agree.sum(axis=1)) / left, np.float64)


def plan(options: KnnShapleyOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard, written by `finish`: every validation row may value any training row."""
    check_vectors(inputs["vectors"])
    return Plan(SHAPLEY, None, options.model_dump())


def finish(job: Job, writer: TableWriter) -> None:
    """Value the training rows, in the order of the vectors."""
    for number in writer.pending(1):
        ids, value = _values(job)
        with writer.shard(number) as out:
            out.write(pa.table([ids, value.astype(np.float32)], schema=SHAPLEY))
            out.count(kept=len(ids), dropped={})


def _values(job: Job) -> tuple[Ints, npt.NDArray[np.float64]]:
    options: KnnShapleyOptions = job.options  # type: ignore[assignment]
    data, vectors = job.input("data"), job.input("vectors")
    train = _labels(data, TRAIN)
    alone = options.validation == "self"
    asking = train if alone else _labels(data, TEST)
    ids = row_numbers(vectors, train.ids)
    n = len(ids)
    if not n:
        return ids, np.zeros(0)
    if not len(asking.ids):
        raise InputError(
            f"`{data.manifest.name}` has no row in the split `{TEST}` to value training rows by."
            " Raise `holdout`, or set `validation: self`."
        )
    row_numbers(vectors, asking.ids)  # refuses validation rows without a vector
    candidates = n - 1 if alone else n
    depth = min(options.depth or 10 * options.k, candidates)
    depth = max(depth, min(options.k, candidates))
    if not depth:  # one row alone has nobody to value it
        return ids, np.zeros(n)
    index = VectorIndex.build(
        unit_batches(vectors, train.ids), kind=options.kind, seed=job.seed, threads=job.threads
    )
    order = np.argsort(ids)
    share = _Shares(train.label, alone) if options.tail == "share" else None
    total = np.zeros(n)
    for asked, rows in _blocks(vectors, asking.ids, max(1, _CELLS // depth)):
        if alone:
            found, _ = nearest_others(index, asked, rows, depth, threads=job.threads)
        else:
            found, _ = index.search(rows, depth, threads=job.threads)
        label = asking.of(asked)
        agree = train.of(found) == label[:, None]
        place = order[np.searchsorted(train.ids, found)]
        beyond = share.beyond(label, agree) if share else None
        part = knn_shapley(place, agree, options.k, n, candidates=candidates, beyond=beyond)
        total += part * len(asked)
    return ids, total / len(asking.ids)


def _labels(data: Table, split: str) -> _Labels:
    ids, label = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch in data.batches(columns=["id", "split", "label"]):
        mine = np.array(batch.column("split").to_pylist(), dtype=str) == split
        ids.append(batch.column("id").to_numpy()[mine])
        label.append(batch.column("label").to_numpy()[mine].astype(np.int64))
    every = np.concatenate(ids)
    order = np.argsort(every)
    return _Labels(refuse_repeats(data, every[order]), np.concatenate(label)[order])


def _blocks(vectors: Table, only: Ints, size: int) -> Iterator[tuple[Ints, Floats]]:
    for ids, rows in unit_batches(vectors, only):
        for start in range(0, len(ids), size):
            yield ids[start : start + size], rows[start : start + size]


SPEC = StepSpec(
    name="knn_shapley",
    version=1,
    options=KnnShapleyOptions,
    inputs={
        "vectors": Slot(("teacher_outputs", "embed")),
        "data": Slot(("read_dataset",)),
    },
    plan=plan,
    finish=finish,
    about="What each training row adds to a k-nearest-neighbour classifier.",
)
