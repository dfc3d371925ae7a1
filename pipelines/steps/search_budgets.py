"""Step `search_budgets`: how much of each part stays, by evolution over whole models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...storage import Table, TableWriter
from ..compression.model_tables import MODEL_STEPS, model_source
from ..compression.search_options import SearchBudgetsOptions
from ..compression.tables import PLAN
from ..compression.work import alone, remove_work, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepSpec, use_threads, write_whole
from ..models import resolved_causal

FOUND = "search.json"


def plan(options: SearchBudgetsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards: every generation hangs on the one before."""
    found = resolved_causal(model_source(options.model, inputs.get("model")))
    identity = options.model_dump(exclude={"model", "device"}) | {"unit": options.unit}
    notes = {
        "model": options.model or "input",
        "evaluations_at_most": options.schedule().limit,
    }
    return Plan(PLAN, None, identity, {"model": found.sha256}, payload=str(found.path), notes=notes)


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Search, and write the best budget's rows; a killed search goes on from its answers.

    Raises
    ------
    BudgetError
        Whole groups cannot meet the sparsity.
    InputError
        Statistics that the method needs are missing, or there are no rows.
    """
    from ..compression.searching import search

    options: SearchBudgetsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    statistics = None
    if job.has("statistics"):
        from ..compression.statistics import StatisticsTable

        statistics = StatisticsTable(job.input("statistics"))
    given = job.input("rows").to_table(columns=["input_ids"])["input_ids"].to_pylist()
    rows = [np.asarray(row, np.int64) for row in given]
    made, found = search(
        job.plan.payload, rows, statistics, options, work_folder(job.key), job.seed
    )
    _attach(writer, found)
    write_whole(writer, pa.Table.from_pylist(made, PLAN))


def _attach(writer: TableWriter, found: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="prunery-search-") as folder:
        path = Path(folder, FOUND)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        writer.attach(FOUND, path)


SPEC = StepSpec(
    name="search_budgets",
    version=1,
    options=SearchBudgetsOptions,
    inputs={
        "rows": Slot(("calibration_rows",)),
        "statistics": Slot(("weight_statistics",), optional=True),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    finish=finish,
    cleanup=remove_work,
    about="How much of each part of a model stays, by evolution over whole models.",
)
