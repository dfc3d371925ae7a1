"""Step `report_prompts`: what a search for a prompt cost and found, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pydantic import Field

from ...storage import Table, TableWriter
from .. import report
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..prompts import report as page
from ..prompts import report_words
from ..prompts.report_words import Words
from ..prompts.task import task_of

_ASKED = ("influence", "search", "control", "verdict")


class ReportPromptsOptions(StepOptions):
    """Options of `report_prompts`.

    Attributes
    ----------
    title
        Heading of the page.
    about
        A sentence below it.
    words
        Words shown of the highest influence, and as many of the lowest.
    input_price, output_price
        Of a million tokens, to tell what the steps cost.
    """

    title: str = "Prompt search"
    about: str = ""
    words: int = Field(default=20, ge=0, le=1000)
    input_price: float | None = Field(default=None, ge=0)
    output_price: float | None = Field(default=None, ge=0)


def plan(options: ReportPromptsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No rows: the page is a file beside the manifest."""
    return Plan(pa.schema([]), 0, options.model_dump(), kind="report")


def finish(job: Job, writer: TableWriter) -> None:
    """Write the page."""
    options: ReportPromptsOptions = job.options  # type: ignore[assignment]
    decided = job.input("decision").manifest.options
    tables = {role: job.input(role).to_table() for role in _ASKED if job.has(role)}
    words = Words.of(tables["influence"], job.input("decision").to_table(), str(decided["reward"]))
    vocabulary = job.input("vocabulary").to_table(["keep", "reason"])
    clusters = job.input("clusters").to_table() if job.has("clusters") else None
    verdict: list[dict[str, Any]] = tables["verdict"].to_pylist()
    judge = str(job.input("verdict").manifest.options.get("judge", "accuracy"))
    costs = _costs(job, tables)
    prices = page.Prices(options.input_price, options.output_price)
    searches = [(name, tables[name]) for name in ("search", "control") if name in tables]
    reward = str(job.input("search").manifest.options.get("reward", decided["reward"]))
    charts = [report_words.influence_chart(words), page.search_chart(searches, reward)]
    rows = report_words.word_rows(words, options.words)
    taken = next((row["prompt"] for row in verdict if row["chosen"]), None)
    settings = {name: decided.get(name) for name in ("reward", "count", "rule")}
    data = report.ReportData(
        **report.frame(
            job,
            job.input("decision"),
            options.title,
            options.about,
            {name: value for name, value in settings.items() if value is not None},
        ),
        cards=page.cards(_stages(vocabulary, clusters, words), costs, prices, verdict),
        charts=[chart for chart in charts if chart is not None],
        rows=rows,
        row_count=len(rows),
        baselines=[],
        examples=[],
        template="prompt_report.html",
        more={
            "sentence": page.sentence(verdict, judge),
            "verdict": page.verdict_rows(verdict, judge),
            "parts": page.rows_of_parts(verdict),
            "prompts": page.prompt_rows(tables["search"], taken),
            "costs": page.cost_rows(costs, prices),
            "priced": prices.known,
            "price_note": page.price_note(costs) if prices.known else "",
            "clusters": report_words.cluster_rows(clusters, words) if clusters is not None else [],
            "clustered": report_words.clustered(clusters) if clusters is not None else "",
            "reasons": report_words.reason_rows(vocabulary, words),
        },
    )
    writer.attach("report.html", report.render(data).encode("utf-8"))


def _costs(job: Job, tables: Mapping[str, pa.Table]) -> list[page.Cost]:
    """What each step asked that is an input here."""
    remote = task_of(job.input("task")).black_box == "endpoint"
    asked = tables["search"].column("prompt").unique()
    finalists = min(int(job.input("verdict").manifest.options.get("finalists", 1)), len(asked))
    made = []
    for role, table in tables.items():
        manifest = job.input(role).manifest
        cost = page.cost_of(
            manifest.name, role, table, manifest.seconds, remote=remote, finalists=finalists
        )
        made.append(cost)
    return made


def _stages(vocabulary: pa.Table, clusters: pa.Table | None, words: Words) -> list[tuple[str, int]]:
    """How many words each stage left."""
    made = [
        ("vocabulary", vocabulary.num_rows),
        ("filtered", pa.compute.sum(vocabulary.column("keep")).as_py() or 0),
    ]
    if clusters is not None:
        made.append(("representatives", pa.compute.sum(clusters.column("keep")).as_py() or 0))
    return [*made, ("kept", int(words.keep.sum()))]


SPEC = StepSpec(
    name="report_prompts",
    version=1,
    options=ReportPromptsOptions,
    inputs={
        "task": Slot(("prompt_task",)),
        "vocabulary": Slot(("prompt_vocabulary",)),
        "clusters": Slot(("cluster_tokens",), optional=True),
        "influence": Slot(("prompt_influence",)),
        "decision": Slot(("prune_prompts",)),
        "search": Slot(("search_prompts",)),
        "control": Slot(("search_prompts",), optional=True),
        "verdict": Slot(("test_prompts",)),
    },
    plan=plan,
    finish=finish,
    about="What a search for a prompt cost and found, as one HTML page.",
)
