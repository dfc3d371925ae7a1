"""Step `prune_dataset`: which training rows of a labelled data set stay. No model runs here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from ...errors import PruneryWarning
from ...pruners.trajectory import SHORT_RUN
from ...storage import Table
from ..dataset_decide import DecideOptions, Decider, decision_rows, empty_classes
from ..dataset_signals import DECIDE_INPUTS, check, expand, training_rows
from ..dataset_tables import DATASET_DECISION
from ..engine import Job, Plan, Rows, StepContext, StepSpec

# Methods that tell hard rows from wrong ones only once the network memorises.
_NEED_LONG_RUNS = ("dyn_unc", "dual")


def plan(options: DecideOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard: such methods look at the whole table."""
    pruner = options.pruner()
    check(expand(pruner.needs, options.difficulty), inputs, f"method `{options.method}`")
    epochs = int(inputs["dynamics"].manifest.options["epochs"]) if "dynamics" in inputs else 0
    if epochs < SHORT_RUN and (
        options.method in _NEED_LONG_RUNS
        or ("difficulty" in pruner.needs and options.difficulty in _NEED_LONG_RUNS)
    ):
        warnings.warn(
            f"`{options.method}` needs a run long enough to memorise; `epochs` is {epochs}. In"
            f" short runs it ranks wrong labels low. Train for {SHORT_RUN} epochs or more, or"
            " use aum or forgetting.",
            PruneryWarning,
            stacklevel=2,
        )
    return Plan(DATASET_DECISION, 1, options.identity())


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about every training row at once."""
    options: DecideOptions = job.options  # type: ignore[assignment]
    inputs = {role: job.input(role) for role in DECIDE_INPUTS if job.has(role)}
    rows = training_rows(inputs["data"])
    selection = Decider.of(options, inputs, rows).select(seed=job.seed)
    empty = empty_classes(rows, selection)
    if empty:
        warnings.warn(
            f"`{job.table}` leaves no row of the classes {', '.join(empty[:10])}"
            f"{' …' if len(empty) > 10 else ''}; a student cannot learn them. Set `floor` above 0"
            " to keep a row of each, or `by: class`.",
            PruneryWarning,
            stacklevel=2,
        )
    out.write(decision_rows(rows, selection))
    out.count(selection.kept, selection.dropped())


SPEC = StepSpec(
    name="prune_dataset",
    version=1,
    options=DecideOptions,
    inputs=DECIDE_INPUTS,
    plan=plan,
    shard=shard,
    about="Which training rows of a labelled data set stay.",
)
