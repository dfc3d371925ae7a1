"""Step `report_dataset`: what was kept of a labelled data set, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ...storage import Table, TableWriter
from .. import dataset_report, report, student_figures
from ..dataset_report import Decided
from ..dataset_tables import TEST
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..tables import rows_by_id


class ReportDatasetOptions(StepOptions):
    """Options of `report_dataset`.

    Attributes
    ----------
    title
        Heading of the page.
    about
        A sentence below it.
    examples
        Rows shown of the most valued, and as many of the least valued.
    """

    title: str = "Pruned data set"
    about: str = ""
    examples: int = Field(default=12, ge=0, le=100)


def plan(options: ReportDatasetOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No rows: the page is a file beside the manifest."""
    return Plan(pa.schema([]), 0, options.model_dump(), kind="report")


def finish(job: Job, writer: TableWriter) -> None:
    """Write the page."""
    options: ReportDatasetOptions = job.options  # type: ignore[assignment]
    rows = _decided(job)
    students, alphas, noise = (_optional(job, role) for role in ("students", "alphas", "noise"))
    grid = student_figures.Grid(students) if students else None
    compared = student_figures.comparisons(grid) if grid else []
    fractions = grid.fractions if grid else []
    charts = [dataset_report.accuracy_chart(grid)] if grid else []
    if job.has("dynamics") and len(rows.ids):
        charts.append(_map(job, rows))
    charts += dataset_report.alpha_charts(alphas)
    classes = dataset_report.class_rows(rows)
    examples = _examples(job, rows, options.examples)
    data = report.ReportData(
        **report.frame(job, job.input("decision"), options.title, options.about, _settings(job)),
        cards=dataset_report.cards(rows, grid),
        charts=charts,
        rows=classes,
        row_count=len(classes),
        baselines=[],
        examples=examples,
        template="dataset_report.html",
        pictures=any(shown["picture"] for shown in examples),
        more={
            "grid": dataset_report.grid_rows(grid) if grid else [],
            "sentences": [comparison.sentence() for comparison in compared],
            "comparisons": dataset_report.comparison_rows(compared, fractions),
            "fractions": [student_figures.percent(fraction) for fraction in fractions],
            "caution": student_figures.caution(grid, _test_rows(job)) if grid else "",
            "clean_known": rows.clean_known,
            "groups": dataset_report.group_rows(rows),
            "noise": dataset_report.noise_lines(noise),
            "chance": dataset_report.by_chance(rows, noise),
            "reasons": dataset_report.reason_rows(rows),
        },
    )
    writer.attach("report.html", report.render(data).encode("utf-8"))


def _settings(job: Job) -> dict[str, Any]:
    """What the decision laid over its method."""
    made = job.input("decision").manifest.options
    balance = dict(zip(("balance", "floor", "cap"), made.get("balance") or (), strict=False))
    named = {name: made.get(name) for name in ("difficulty", "by")} | balance
    return {name: value for name, value in named.items() if value}


def _decided(job: Job) -> Decided:
    decision = job.input("decision").to_table(["id", "keep", "score", "reason"])
    data = job.input("data")
    found = data.lookup(decision.column("id").to_numpy(), ["label", "clean_label", "group"])
    return Decided.of(decision, found, data.manifest.notes.get("classes", []))


def _optional(job: Job, role: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = job.input(role).to_table().to_pylist() if job.has(role) else []
    return rows


def _map(job: Job, rows: Decided) -> report.Chart:
    ids = dataset_report.map_ids(rows.ids)
    spread = dataset_report.Spread(ids)
    for batch in job.input("dynamics").batches(columns=["sample", "run", "true_probability"]):
        spread.add(*(column.to_numpy(zero_copy_only=False) for column in batch.columns))
    return dataset_report.data_map(rows, ids, spread)


def _test_rows(job: Job) -> int:
    return sum(
        int(pc.sum(pc.equal(batch.column("split"), TEST)).as_py() or 0)
        for batch in job.input("data").batches(columns=["split"])
    )


def _examples(job: Job, rows: Decided, count: int) -> list[dict[str, str]]:
    chosen = dataset_report.valued(rows, count)
    ids = [int(rows.ids[number]) for _, number in chosen]
    data = rows_by_id(job.input("data"), ids, ["source", "text", "features", "image"])
    said: dict[int, dict[str, Any]] = {}
    if job.has("outputs"):
        said = rows_by_id(job.input("outputs"), ids, ["log_probability"])
    return [
        dataset_report.example(
            rows, number, side, data[id_], said[id_]["log_probability"] if said else None
        )
        for id_, (side, number) in zip(ids, chosen, strict=True)
    ]


SPEC = StepSpec(
    name="report_dataset",
    version=1,
    options=ReportDatasetOptions,
    inputs={
        "data": Slot(("read_dataset",)),
        "decision": Slot(("prune_dataset",)),
        "dynamics": Slot(("train_classifier",), optional=True),
        "students": Slot(("distil",), optional=True),
        "alphas": Slot(("sweep_alpha",), optional=True),
        "noise": Slot(("noise_found",), optional=True),
        "outputs": Slot(("teacher_outputs",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="What was kept of a labelled data set, as one HTML page.",
)
