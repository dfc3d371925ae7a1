"""Step `index`: the vectors of the kept passages, ready to be searched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError, RecipeError
from ...storage import Table, TableWriter, VectorIndex
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..tables import among, kept_ids, vectors_of

_OPEN: OrderedDict[tuple[str, str], VectorIndex] = OrderedDict()


class IndexOptions(StepOptions):
    """Options of `index`.

    Attributes
    ----------
    kind
        flat (exact), hnsw, ivf,pq; auto chooses by the number of vectors.
    """

    kind: Literal["auto", "flat", "hnsw", "ivf,pq"] = "auto"


def plan(options: IndexOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: the index is made of all vectors at once."""
    decision = inputs.get("decision")
    vectors = inputs["vectors"]
    if decision is not None and vectors.key not in decision.manifest.parents:
        raise RecipeError(
            f"the decision `{decision.manifest.name}` is not about the vectors"
            f" `{vectors.manifest.name}`. Give both steps the same vectors."
        )
    kept = vectors.num_rows if decision is None else decision.manifest.kept
    if not kept:
        raise InputError(
            f"no passage is left to index: `{vectors.manifest.name}` has {vectors.num_rows} rows,"
            " of which none is kept. Check the path of the chunk step."
        )
    return Plan(
        VectorIndex.schema(),
        None,
        options.model_dump(),
        {"encoder": vectors.manifest.models["encoder"]},
        kind="index",
    )


def finish(job: Job, writer: TableWriter) -> None:
    """Build and attach the index."""
    options: IndexOptions = job.options  # type: ignore[assignment]
    made = VectorIndex.build(_batches(job), kind=options.kind, seed=job.seed, threads=job.threads)
    made.write_to(writer)


def _batches(job: Job) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    kept = kept_ids(job.input("decision")) if job.has("decision") else None
    for batch in job.input("vectors").batches():
        ids = batch.column("id").to_numpy(zero_copy_only=False)
        vectors = vectors_of(batch.column("embedding"))
        if kept is not None:
            mask = among(ids, kept)
            ids, vectors = ids[mask], vectors[mask]
        if len(ids):
            yield ids, vectors


def open_index(table: Table) -> VectorIndex:
    """The index of a table, opened and checked once a process."""
    key = (str(table.attachment("index.json")), table.key)
    found = _OPEN.pop(key, None) or VectorIndex.from_table(table)
    _OPEN[key] = found
    while len(_OPEN) > 2:
        _OPEN.popitem(last=False)
    return found


SPEC = StepSpec(
    name="index",
    version=1,
    options=IndexOptions,
    inputs={
        "vectors": Slot(("embed",)),
        "decision": Slot(("prune_passages",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="The vectors of the kept passages, ready to be searched.",
)
