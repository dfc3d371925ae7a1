"""Step `prune_context`: which sentences of the retrieved passages stay. No model runs here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ...errors import InputError, RecipeError
from ...pruners.contract import Pruner, Signals
from ...storage import Table
from ..bundles import shard_of
from ..decisions import SCHEMA, MethodOptions, decision_table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..signal_columns import columns_for, signals_from


class PruneContextOptions(MethodOptions):
    """Options of `prune_context`: a method over sentences, and that method's own options."""

    method: str = "provence"

    @classmethod
    def units(cls) -> frozenset[str]:
        """Methods that decide about sentences."""
        return frozenset({"sentence"})


def settled(options: PruneContextOptions, signals: Table) -> dict[str, Any]:
    """The method's options, with the network's own threshold and aggregation where not given."""
    given = dict(options.options)
    if options.method == "provence":
        for name in ("threshold", "aggregation"):
            own = signals.manifest.notes.get(name)
            if given.get(name) is None and own is not None:
                given[name] = own
    return given


def plan(options: PruneContextOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each shard of signals; one for all where the method looks at all rows."""
    signals = inputs["signals"]
    made = options.model_copy(update={"options": settled(options, signals)})
    pruner = made.pruner()
    _check_signals(pruner, signals, context.seed)
    shards = signals.shards() if pruner.scope != "table" else [-1]
    identity = {"method": options.method, "options": made.options, "made": repr(pruner)}
    return Plan(SCHEMA, len(shards), identity, payload=(shards, made))


def _check_signals(pruner: Pruner, signals: Table, seed: int) -> None:
    """Let the method look at no rows: what it lacks, it says now and not in a shard."""
    columns = columns_for(pruner, signals.schema.names)
    missing = sorted(set(columns) - set(signals.schema.names))
    problem = f"the signals {', '.join(missing)} are missing" if missing else ""
    if not missing:
        try:
            pruner(signals_from(signals.schema.empty_table(), columns), seed=seed)
        except InputError as error:
            problem = str(error)
    if problem:
        raise RecipeError(
            f"{pruner!r} cannot decide over `{signals.manifest.name}`: {problem} Name what it"
            " needs in the option `signals` of that context_signals step."
        )


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about the sentences of one shard."""
    shards, options = job.plan.payload
    table = job.input("signals")
    pruner = options.pruner()
    columns = columns_for(pruner, table.schema.names)
    if shards[index] < 0:
        rows: pa.Table = table.to_table(columns=columns)
    else:
        rows = shard_of(table, shards[index], columns)
    signals: Signals = signals_from(rows, columns)
    selection = pruner(signals, seed=job.seed)
    out.write(decision_table(signals["id"], selection))
    out.count(selection.kept, selection.dropped())


SPEC = StepSpec(
    name="prune_context",
    version=1,
    options=PruneContextOptions,
    inputs={"signals": Slot(("context_signals",))},
    plan=plan,
    shard=shard,
    about="Which sentences of the retrieved passages stay.",
)
