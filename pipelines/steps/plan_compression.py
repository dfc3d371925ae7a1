"""Step `plan_compression`: how much of every part of a model stays, and in how many bits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ...storage import Table, TableWriter
from ..compression.model_tables import MODEL_STEPS, model_source
from ..compression.plan_options import PlanOptions
from ..compression.tables import PLAN
from ..engine import Job, Plan, Slot, StepContext, StepSpec, use_threads, write_whole
from ..models import resolved_causal

if TYPE_CHECKING:
    from ..compression.statistics import StatisticsTable

TOTALS = "totals.json"


def plan(options: PlanOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards: a budget is spread over all layers at once.

    The identity holds the method and its options, so that who carries the plan out reads them
    from the manifest.
    """
    source = model_source(options.model, inputs.get("model"))
    found = resolved_causal(source)
    notes = {"model": options.model or "input"}
    return Plan(
        PLAN,
        None,
        options.identity(),
        {"model": found.sha256},
        payload=str(found.path),
        notes=notes,
    )


def finish(job: Job, writer: TableWriter) -> None:
    """Write the rows, and parameters before and after by unit as an attachment.

    Raises
    ------
    BudgetError, RecipeError, InputError
        As `plan.make_plan` says.
    """
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.plan import Sources, make_plan, plan_totals

    options: PlanOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    sources = Sources(
        StreamedModel(job.plan.payload),
        statistics_of(job),
        job.input("budgets").to_table().to_pylist() if job.has("budgets") else None,
        job.seed,
    )
    rows = make_plan(sources, options)
    with tempfile.TemporaryDirectory(prefix="prunery-plan-") as folder:
        path = Path(folder, TOTALS)
        path.write_text(json.dumps(plan_totals(rows), indent=1, sort_keys=True) + "\n")
        writer.attach(TOTALS, path)
    write_whole(writer, pa.Table.from_pylist(rows, PLAN))


def statistics_of(job: Job) -> StatisticsTable | None:
    """The layers' statistics, where the step was given any."""
    if not job.has("statistics"):
        return None
    from ..compression.statistics import StatisticsTable

    return StatisticsTable(job.input("statistics"))


SPEC = StepSpec(
    name="plan_compression",
    version=1,
    options=PlanOptions,
    inputs={
        "statistics": Slot(("weight_statistics",), optional=True),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
        "budgets": Slot(("search_budgets",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="How much of every part of a model stays, and in how many bits.",
)
