"""Step `prune_passages`: which passages are worth indexing, by any method over whole rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...errors import InputError
from ...pruners.contract import Signals
from ...storage import Table
from ..decisions import SCHEMA, MethodOptions, decision_table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..tables import vectors_of


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
    missing = pruner.needs - {"id", "embedding"}
    if missing:
        raise InputError(
            f"method `{options.method}` needs the signals {', '.join(sorted(missing))}, which"
            " passages do not have. Choose a method that needs only ids and embeddings."
        )
    return Plan(SCHEMA, 1, options.model_dump() | {"made": repr(pruner)})


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about every row at once."""
    options: PrunePassagesOptions = job.options  # type: ignore[assignment]
    rows = job.input("vectors").to_table()
    ids = rows.column("id").to_numpy().astype(np.int64)
    signals = Signals({"id": ids, "embedding": vectors_of(rows.column("embedding"))})
    selection = options.pruner()(signals, seed=job.seed)
    out.write(decision_table(ids, selection))
    out.count(selection.kept, selection.dropped())


SPEC = StepSpec(
    name="prune_passages",
    version=1,
    options=PrunePassagesOptions,
    inputs={"vectors": Slot(("embed",))},
    plan=plan,
    shard=shard,
    about="Which passages are worth indexing; near-duplicates go.",
)
