"""Step `prune_passages`: which passages are worth indexing, by any method over whole rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ...errors import InputError
from ...pruners.contract import Array, Signals
from ...storage import Table
from ..decisions import SCHEMA, MethodOptions, among_all, decision_table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..tables import among, kept_ids, vectors_of

_CLUSTERED = ("cluster", "centroid_distance")


class PrunePassagesOptions(MethodOptions):
    """Options of `prune_passages`: a method over samples, and that method's own options."""

    method: str = "near_duplicate"

    @classmethod
    def units(cls) -> frozenset[str]:
        """Methods that decide about whole rows."""
        return frozenset({"sample", "passage"})


def plan(options: PrunePassagesOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard: such methods look at the whole table."""
    pruner = options.pruner()
    have = {"id", "embedding", *(_CLUSTERED if "clusters" in inputs else ())}
    missing = pruner.needs - have
    if missing:
        raise InputError(
            f"method `{options.method}` needs the signals {', '.join(sorted(missing))}, which"
            " passages do not have. Choose a method that needs only ids and embeddings, or give"
            " the step an input `clusters`, made by cluster_rows."
        )
    return Plan(SCHEMA, 1, options.model_dump() | {"made": repr(pruner)})


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about every row at once; rows that an earlier decision dropped stay dropped."""
    options: PrunePassagesOptions = job.options  # type: ignore[assignment]
    rows = job.input("vectors").to_table()
    ids = rows.column("id").to_numpy().astype(np.int64)
    left = np.arange(len(ids))
    if job.has("after"):
        left = np.flatnonzero(among(ids, kept_ids(job.input("after"))))
    pruner = options.pruner()
    arrays: dict[str, Array] = {"id": ids[left]}
    if "embedding" in pruner.needs:
        arrays["embedding"] = vectors_of(rows.column("embedding").take(pa.array(left)))
    for name in sorted(pruner.needs.intersection(_CLUSTERED)):
        found = job.input("clusters").lookup(ids[left], columns=["id", name])
        arrays[name] = found.column(name).to_numpy()
    selection = among_all(pruner(Signals(arrays), seed=job.seed), len(ids), left)
    out.write(decision_table(ids, selection))
    out.count(selection.kept, selection.dropped())


SPEC = StepSpec(
    name="prune_passages",
    version=1,
    options=PrunePassagesOptions,
    inputs={
        "vectors": Slot(("embed",)),
        "clusters": Slot(("cluster_rows",), optional=True),
        "after": Slot(("prune_passages",), optional=True),
    },
    plan=plan,
    shard=shard,
    about="Which passages are worth indexing; near-duplicates go.",
)
