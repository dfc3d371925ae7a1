"""Step `report`: the run as one HTML page, from the tables alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...pruners.catalogue import METHODS
from ...storage import Table, TableWriter
from .. import report
from ..answers import find_answers
from ..bundles import BASELINES, Bundle, aligned, bundles, shard_of
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec
from ..run_totals import fate

_BINS = 25
_PASSAGES_AN_EXAMPLE = 4


class ReportOptions(StepOptions):
    """Options of `report`.

    Attributes
    ----------
    title
        Heading of the page.
    about
        A sentence below it.
    examples
        Questions shown with their passages: those whose answer was lost first.
    """

    title: str = "Pruned contexts"
    about: str = ""
    examples: int = Field(default=8, ge=0, le=100)


def plan(options: ReportOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No rows: the page is a file beside the manifest."""
    return Plan(pa.schema([]), 0, options.model_dump(), kind="report")


def finish(job: Job, writer: TableWriter) -> None:
    """Write the page."""
    options: ReportOptions = job.options  # type: ignore[assignment]
    decision = job.input("decision")
    rows: list[dict[str, Any]] = job.input("evaluation").to_table().to_pylist()
    made = decision.manifest.options
    budget = METHODS[made["method"]].budget
    current = made["options"].get(budget.field)
    charts = report.curve_charts(job.input("curve").to_table().to_pylist(), made["method"], current)
    threshold = current if budget.kind == "threshold" else None
    charts.append(_scores(decision, threshold))
    baselines = [
        name for name in BASELINES if any(row[f"answer_kept_{name}"] is not None for row in rows)
    ]
    data = report.ReportData(
        **report.frame(job, decision, options.title, options.about),
        cards=report.cards(rows),
        charts=charts if rows else charts[-1:],
        rows=report.question_rows(rows, baselines),
        row_count=len(rows),
        baselines=baselines,
        examples=_examples(job, _chosen(rows, options.examples)),
    )
    writer.attach("report.html", report.render(data).encode("utf-8"))


def _scores(decision: Table, threshold: float | None) -> report.Chart:
    scores: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    keeps: list[np.ndarray[Any, np.dtype[np.bool_]]] = []
    for batch in decision.batches(columns=["score", "keep"]):
        scores.append(batch.column("score").to_numpy(zero_copy_only=False))
        keeps.append(batch.column("keep").to_numpy(zero_copy_only=False))
    score = np.concatenate(scores) if scores else np.zeros(0, np.float32)
    keep = np.concatenate(keeps) if keeps else np.zeros(0, np.bool_)
    low, high = (float(score.min()), float(score.max())) if len(score) else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    kept, _ = np.histogram(score[keep], edges)
    dropped, _ = np.histogram(score[~keep], edges)
    return report.score_chart(edges.tolist(), kept.tolist(), dropped.tolist(), threshold)


def _chosen(rows: Sequence[Mapping[str, Any]], count: int) -> dict[int, Mapping[str, Any]]:
    """Half for the answers that were lost, the rest spread over the others."""
    lost = [row for row in rows if fate(row) == "lost"]
    others = [row for row in rows if fate(row) != "lost"]
    first = lost[: max(count // 2, count - len(others))]
    left = count - len(first)
    step = max(1, len(others) // left) if left else 1
    spread = others[::step][:left]
    return {row["id"]: row for row in [*spread, *first]}


def _examples(job: Job, chosen: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    signals = job.input("signals")
    decision = job.input("decision")
    found: dict[int, dict[str, Any]] = {}
    for number in signals.shards():
        if len(found) == len(chosen):
            break
        asked = shard_of(signals, number, ["question"]).column("question").to_pylist()
        if not chosen.keys() & set(asked):
            continue
        decided = aligned(decision, signals, number)
        for bundle in bundles(
            shard_of(signals, number), job.input("questions"), job.input("chunks")
        ):
            row = chosen.get(bundle.question["id"])
            if row is not None:
                start, stop = bundle.rows
                found[row["id"]] = _example(bundle, decided.slice(start, stop - start), row)
    return [found[key] for key in chosen if key in found]


def _example(bundle: Bundle, decided: pa.Table, row: Mapping[str, Any]) -> dict[str, Any]:
    passages = bundle.passages()
    order = list(range(len(passages)))
    if "relevance_logit" in bundle.columns.column_names:
        logits = bundle.columns.column("relevance_logit").to_pylist()
        order.sort(key=lambda i: -(logits[passages[i][0]] or 0.0))
    holding = {i for i, (a, b) in enumerate(passages) for o in bundle.occurrences if a <= o[0] < b}
    shown = order[:_PASSAGES_AN_EXAMPLE]
    extra = [i for i in order[_PASSAGES_AN_EXAMPLE:] if i in holding][:1]
    hidden = len(passages) - len(shown) - len(extra)
    removed = 1 - row["tokens_out"] / row["tokens_in"] if row["tokens_in"] else 0.0
    return {
        "question": bundle.question["question"],
        "note": f"{removed:.0%} of {row['tokens_in']:,} tokens removed, answer {fate(row)}",
        "passages": [
            _passage(bundle, decided, passages[i], order.index(i)) for i in [*shown, *extra]
        ],
        "hidden": f"{hidden} more passages are not shown." if hidden > 0 else "",
    }


def _passage(bundle: Bundle, decided: pa.Table, span: tuple[int, int], rank: int) -> dict[str, Any]:
    first, last = span
    chunk = int(bundle.chunk[first])
    text = bundle.texts[chunk]
    spans = find_answers(text, bundle.question["answers"] or [])
    rows = decided.slice(first, last - first).to_pylist()
    sentences = []
    for row, start, end in zip(
        rows, bundle.start[first:last].tolist(), bundle.end[first:last].tolist(), strict=True
    ):
        limit = "" if row["threshold"] is None else f" against {row['threshold']:.3g}"
        sentences.append(
            {
                "tag": "span" if row["keep"] else "del",
                "heat": min(9, max(0, int(row["score"] * 10))),
                "tip": f"{row['reason']}: score {row['score']:.3f}{limit}",
                "pieces": _pieces(text, start, end, spans),
            }
        )
    kept = sum(row["keep"] for row in rows)
    logits = bundle.columns.column_names
    relevance = (
        f", relevance {bundle.columns.column('relevance_logit')[first].as_py():.2f}"
        if "relevance_logit" in logits
        else ""
    )
    return {
        "where": bundle.titles[chunk] or "untitled",
        "note": f"place {rank + 1}{relevance}, {kept} of {len(rows)} sentences kept",
        "sentences": sentences,
    }


def _pieces(
    text: str, start: int, end: int, spans: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """A sentence cut where an answer begins or ends."""
    made = []
    at = start
    for a, b in spans:
        a, b = max(a, at), min(b, end)
        if a >= b:
            continue
        if a > at:
            made.append({"text": text[at:a], "answer": False})
        made.append({"text": text[a:b], "answer": True})
        at = b
    if at < end:
        made.append({"text": text[at:end], "answer": False})
    return made


SPEC = StepSpec(
    name="report",
    version=1,
    options=ReportOptions,
    inputs={
        "evaluation": Slot(("evaluate",)),
        "curve": Slot(("sweep",)),
        "signals": Slot(("context_signals",)),
        "decision": Slot(("prune_context",)),
        "questions": Slot(("questions",)),
        "chunks": Slot(("chunk",)),
        "contexts": Slot(("pack",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="The run as one HTML page that opens off line.",
)
