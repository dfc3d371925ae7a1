"""Step `cluster_rows`: the k-means cluster of each row's embedding, and how far in it lies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...pruners import rules
from ...storage import Table, TableWriter, nearest_centres, spherical_kmeans
from ..dataset_tables import CLUSTERS
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..tables import among, kept_ids
from ..vector_rows import Ints, check_vectors, row_numbers, training_ids, unit_batches

_ROWS_A_CLUSTER = 128


class ClusterRowsOptions(StepOptions):
    """Options of `cluster_rows`.

    Attributes
    ----------
    clusters
        How many; None takes about the square root of the number of rows. Fewer distinct rows
        than that make one cluster each. Near-duplicates that clusters part are not found:
        fewer clusters part fewer, and cost SemDeDup more.
    iterations
        Rounds of k-means.
    sample
        Rows that the centres are found from, drawn by (seed, id); None takes 128 a cluster.
        At least as many as clusters. Only these stand in memory.
    """

    clusters: int | None = Field(default=None, ge=1, le=1_000_000)
    iterations: int = Field(default=20, ge=1, le=1000)
    sample: int | None = Field(default=None, ge=1, le=100_000_000)


def plan(options: ClusterRowsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: the centres are those of all rows. Shards follow the vectors'."""
    check_vectors(inputs["vectors"])
    return Plan(CLUSTERS, None, options.model_dump())


def finish(job: Job, writer: TableWriter) -> None:
    """Find the centres on a sample, then go through the rows once."""
    vectors = job.input("vectors")
    only = _wanted(job)
    centres = _centres(job, vectors, only)
    shards = vectors.shards()
    for number in writer.pending(len(shards)):
        with writer.shard(number) as out:
            kept = 0
            for ids, rows in unit_batches(vectors, only, shard=shards[number]):
                cluster, distance = nearest_centres(rows, centres, threads=job.threads)
                out.write(pa.table([ids, cluster.astype(np.int32), distance], schema=CLUSTERS))
                kept += len(ids)
            out.count(kept=kept, dropped={})


def _wanted(job: Job) -> Ints | None:
    """Sorted ids of the rows to cluster; None for all."""
    only = training_ids(job.input("data")) if job.has("data") else None
    if job.has("decision"):
        kept = kept_ids(job.input("decision"))
        only = kept if only is None else only[among(only, kept)]
    return only


def _centres(job: Job, vectors: Table, only: Ints | None) -> npt.NDArray[np.float32]:
    options: ClusterRowsOptions = job.options  # type: ignore[assignment]
    ids = row_numbers(vectors, only)
    clusters = options.clusters or max(1, round(len(ids) ** 0.5))
    wanted = max(clusters, options.sample or _ROWS_A_CLUSTER * clusters)
    # In the order of the draw, which k-means starts from: the order of rows plays no part.
    drawn = ids[np.lexsort((ids, rules.uniform(job.seed, ids)))[:wanted]]
    place = np.argsort(drawn)
    ordered = drawn[place]
    sample = np.zeros((len(drawn), check_vectors(vectors)), np.float32)
    for found, rows in unit_batches(vectors, ordered):
        sample[place[np.searchsorted(ordered, found)]] = rows
    return spherical_kmeans(sample, clusters, iterations=options.iterations, threads=job.threads)


SPEC = StepSpec(
    name="cluster_rows",
    version=1,
    options=ClusterRowsOptions,
    inputs={
        "vectors": Slot(("teacher_outputs", "embed")),
        "data": Slot(("read_dataset",), optional=True),
        "decision": Slot(("prune_passages", "prune_dataset"), optional=True),
    },
    plan=plan,
    finish=finish,
    about="The k-means cluster of each embedding: of all rows, or of training or kept rows.",
)
