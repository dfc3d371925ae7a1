"""Step `report_compression`: what a model lost and gained, from first row to last weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field

from ...storage import Table, TableWriter
from .. import report
from ..compression import report as page
from ..compression.gate import ACCEPTED
from ..compression.verify_tables import COMPRESSED_MODEL, COMPRESSED_STEPS, judged_rows
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec

_DECISIONS = {"duplicates": "Near-duplicates", "decision": "What was worth training on"}
_TEXTS = {"duplicates": "documents", "decision": "chats"}
_SETTINGS = ("sparsity", "pattern", "bits", "group_size", "quantiser", "allocation")


class ReportCompressionOptions(StepOptions):
    """Options of `report_compression`.

    Attributes
    ----------
    title
        Heading of the page.
    about
        A sentence below it.
    examples
        Dropped rows shown of each decision.
    """

    title: str = "Compressed model"
    about: str = ""
    examples: int = Field(default=4, ge=0, le=50)


def plan(
    options: ReportCompressionOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No rows: the page is a file beside the manifest."""
    return Plan(pa.schema([]), 0, options.model_dump(), kind="report")


def finish(job: Job, writer: TableWriter) -> None:
    """Write the page."""
    options: ReportCompressionOptions = job.options  # type: ignore[assignment]
    verify = job.input("verify")
    rows = {row["role"]: row for row in judged_rows(verify)}
    told = rows[COMPRESSED_MODEL]
    sizes = json.loads(verify.attachment("sizes.json").read_text())
    compressed = job.input("model").to_table().to_pylist()
    fates, examples = _fates(job, options.examples)
    shown = page.measure_rows(rows)
    more = {
        "models": page.model_names(rows),
        "verdict": told["verdict"],
        "accepted": told["verdict"] == ACCEPTED,
        "reasons": told["reasons"],
        "tasks": page.task_rows(rows),
        "sizes": page.size_rows(sizes),
        "notes": sizes["notes"],
        "plan": page.plan_rows(_rows(job, "plan")),
        "calibration": _calibration(job),
        "fates": fates,
    }
    data = report.ReportData(
        **_frame(job, options),
        cards=page.cards(rows, int(sizes["packed"])),
        charts=page.charts(rows, compressed),
        rows=shown,
        row_count=len(shown),
        baselines=[],
        examples=examples,
        template="compression_report.html",
        more=more,
    )
    writer.attach("report.html", report.render(data).encode("utf-8"))


def _frame(job: Job, options: ReportCompressionOptions) -> dict[str, Any]:
    """As `report.frame`, from the plan where one is given: a model made otherwise has no method."""
    model = job.input("model").manifest
    planned: Mapping[str, Any] = model.notes.get("plan") or {}
    if job.has("plan"):
        planned = job.input("plan").manifest.options
    manifests = report.ancestry(job)
    settings = {name: planned.get(name) for name in _SETTINGS} | dict(planned.get("options") or {})
    return {
        "title": options.title,
        "about": options.about,
        "created": max(m.created for m in manifests)[:19].replace("T", " "),
        "method": planned.get("method", model.step),
        "settings": ", ".join(f"{key}={v}" for key, v in settings.items() if v is not None),
        "lineage": report.lineage_rows(manifests),
        "models": sorted({(f"{m.name}: {k}", v) for m in manifests for k, v in m.models.items()}),
        "libraries": report.libraries(manifests),
    }


def _rows(job: Job, role: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = job.input(role).to_table().to_pylist() if job.has(role) else []
    return found


def _calibration(job: Job) -> dict[str, Any] | None:
    if not job.has("calibration"):
        return None
    table = job.input("calibration")
    columns = table.to_table(columns=["domain", "input_ids", "sources"])
    return page.calibration(columns, table.manifest.notes, table.manifest.seed)


def _fates(job: Job, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each decision before the calibration kept, and some of what it dropped."""
    used: set[int] = set()
    if job.has("calibration"):
        sources = job.input("calibration").to_table(columns=["sources"]).column("sources")
        used = {one for row in sources.to_pylist() for one in row}
    fates, examples = [], []
    for role, title in _DECISIONS.items():
        if not job.has(role):
            continue
        decision = job.input(role).to_table(columns=["id", "keep", "reason", "score"])
        fates.append(page.fate(title, decision, used))
        examples += [
            {"of": title, **example} for example in _examples(job, _TEXTS[role], decision, count)
        ]
    return fates, examples


def _examples(job: Job, role: str, decision: pa.Table, count: int) -> list[dict[str, Any]]:
    """Dropped rows with their text; none where the table of texts is not given."""
    ids = page.dropped_ids(decision, count)
    if not ids or not job.has(role):
        return []
    about = {row["id"]: row for row in decision.to_pylist()}
    column = "messages" if "messages" in job.input(role).schema.names else "text"
    table = job.input(role).lookup(ids, columns=["id", column], missing="skip")
    return [
        {
            "id": row["id"],
            "reason": about[row["id"]]["reason"],
            "score": _number(about[row["id"]]["score"]),
            "text": page.shortened(_text(row[column])),
        }
        for row in table.to_pylist()
    ]


def _text(value: str | Iterable[Mapping[str, Any]]) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.3g}"


SPEC = StepSpec(
    name="report_compression",
    version=1,
    options=ReportCompressionOptions,
    inputs={
        "verify": Slot(("verify_compression",)),
        "model": Slot(COMPRESSED_STEPS),
        "plan": Slot(("plan_compression",), optional=True),
        "calibration": Slot(("calibration_rows",), optional=True),
        "export": Slot(("export_model",), optional=True),
        "decision": Slot(("prune_sft", "prune_dataset", "prune_scores"), optional=True),
        "chats": Slot(("read_chats",), optional=True),
        "duplicates": Slot(("prune_passages", "prune_scores", "prune_sft"), optional=True),
        "documents": Slot(("chunk", "read_dataset", "read_chats"), optional=True),
    },
    plan=plan,
    finish=finish,
    about="What a model lost and gained, with the lineage of its calibration, as one HTML page.",
)
