"""The report of a run: one HTML file that opens off line, under a megabyte.

No script, no outside host; everything that came from data is escaped, so a passage that holds
markup is shown as text. Charts are SVG made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from .._version import __version__
from ..storage import Manifest, Table
from . import svg
from .engine import Job
from .run_totals import fate, totals

MAX_BYTES = 1_000_000
_ROWS_SHOWN = 1000


@dataclass(frozen=True)
class Chart:
    """A figure: an SVG with its title, a legend of (class, name), and a note below."""

    title: str
    svg: Markup
    legend: list[dict[str, str]]
    note: str


@dataclass(frozen=True)
class ReportData:
    """All that the page shows, in plain words and numbers.

    `template` says how `rows`, `examples` and `more` (what one kind of page alone has) are
    shown; the frame around them is the same. `pictures` lets the page show `data:` images.
    """

    title: str
    about: str
    created: str
    method: str
    settings: str
    cards: list[dict[str, str]]
    charts: list[Chart]
    rows: list[dict[str, Any]]
    row_count: int
    baselines: list[str]
    examples: list[dict[str, Any]]
    lineage: list[dict[str, Any]]
    models: list[tuple[str, str]]
    libraries: str
    template: str = "report.html"
    more: Mapping[str, Any] = field(default_factory=dict)
    pictures: bool = False
    version: str = field(default=__version__)


@cache
def _environment() -> Environment:
    folder = resources.files("prunery.pipelines")
    pages = {p.name: p.read_text("utf-8") for p in folder.iterdir() if p.name.endswith(".html")}
    return Environment(
        loader=DictLoader(pages),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        auto_reload=False,
    )


def render(data: ReportData) -> str:
    """The page, below `MAX_BYTES`: examples, then rows, are left out until it fits."""
    template = _environment().get_template(data.template)
    while True:
        page = template.render(data=data)
        size = len(page.encode("utf-8"))
        if size < MAX_BYTES or not (data.examples or data.rows):
            return page
        if data.examples:
            data = replace(data, examples=data.examples[: len(data.examples) // 2])
        else:
            data = replace(data, rows=data.rows[: len(data.rows) // 2])


def cards(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The totals of an evaluate table, as the page's head shows them."""
    total = totals(list(map(dict, rows)))
    made = [
        {
            "label": "Questions",
            "value": f"{total['questions']:,}",
            "note": f"{sum(row['passages'] for row in rows):,} retrieved passages",
        },
        {
            "label": "Tokens",
            "value": f"{total['tokens_in']:,} → {total['tokens_out']:,}",
            "note": f"{_share_removed(total['tokens_in'], total['tokens_out'])} removed",
        },
        {
            "label": "Characters removed",
            "value": _share_removed(total["chars_in"], total["chars_out"]),
            "note": f"{total['chars_in']:,} before, {total['chars_out']:,} after",
        },
    ]
    if total["with_answers"]:
        made.append(
            {
                "label": "Answers kept",
                "value": f"{total['answer_kept']} of {total['answer_retrieved']}",
                "note": f"retrieved for {total['answer_retrieved']} of {total['with_answers']}",
            }
        )
    return made


def _share_removed(before: int, after: int) -> str:
    return f"{1 - after / before:.0%}" if before else "nothing"


def question_rows(
    rows: Sequence[Mapping[str, Any]], baselines: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of the table of questions."""
    made = []
    for row in rows[:_ROWS_SHOWN]:
        others = [fate({**row, "answer_kept": row[f"answer_kept_{name}"]}) for name in baselines]
        made.append(
            {
                "name": row["name"],
                "question": row["question"],
                "before": f"{row['tokens_in']:,}",
                "after": f"{row['tokens_out']:,}",
                "removed": _share_removed(row["tokens_in"], row["tokens_out"]),
                "fate": fate(row),
                "cls": _class_of(fate(row)),
                "others": [{"fate": word, "cls": _class_of(word)} for word in others],
            }
        )
    return made


def _class_of(word: str) -> str:
    return word if word in ("kept", "lost") else "none"


def curve_charts(
    points: Sequence[Mapping[str, Any]], method: str, budget: float | None
) -> list[Chart]:
    """Retention against compression for every method, and both against the budget."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        by_method.setdefault(point["method"], []).append(point)
    names = [method, *sorted(name for name in by_method if name != method)]
    series = []
    for slot, name in enumerate(names):
        line = sorted((_removed(p), _kept(p)) for p in by_method.get(name, ()))
        at = next((p for p in by_method.get(name, ()) if p["budget"] == budget), None)
        mark = (_removed(at), _kept(at)) if at is not None else None
        series.append(svg.Series(name, line, slot % 4, mark))
    legend = [{"cls": f"s{slot % 4}", "name": name} for slot, name in enumerate(names)]
    counted = max((p["questions"] for p in points), default=0)
    first = svg.line_chart(
        series,
        x_label="characters removed",
        y_label="answers kept",
        label="Share of answers kept against share of characters removed, for each method",
    )
    charts = [
        Chart(
            "Answers kept against compression",
            first,
            legend,
            f"Of the {counted} questions whose answer was retrieved. The dots are this run.",
        )
    ]
    own = sorted(by_method.get(method, ()), key=lambda p: p["budget"])
    if len(own) > 1:
        low, high = own[0]["budget"], own[-1]["budget"]
        second = svg.line_chart(
            [
                svg.Series("characters removed", [(p["budget"], _removed(p)) for p in own], 0),
                svg.Series("answers kept", [(p["budget"], _kept(p)) for p in own], 1),
            ],
            x_label="budget (threshold or share)",
            y_label="share",
            label="Characters removed and answers kept against the budget of the method",
            x_range=(low, high if high > low else low + 1),
            percent_x=False,
        )
        charts.append(
            Chart(
                f"The budget of {method}",
                second,
                [
                    {"cls": "s0", "name": "characters removed"},
                    {"cls": "s1", "name": "answers kept"},
                ],
                "A sentence stays when its score exceeds the threshold, where that is the budget.",
            )
        )
    return charts


def _removed(point: Mapping[str, Any]) -> float:
    return 1 - point["chars_out"] / point["chars_in"] if point["chars_in"] else 0.0


def _kept(point: Mapping[str, Any]) -> float:
    return point["answers_kept"] / point["questions"] if point["questions"] else float("nan")


def score_chart(
    edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int], threshold: float | None
) -> Chart:
    """How the scores of kept and dropped sentences are spread."""
    return Chart(
        "Scores of sentences",
        svg.histogram(
            edges,
            kept,
            dropped,
            x_label="score",
            y_label="sentences",
            label="Number of kept and dropped sentences by score",
            threshold=threshold,
        ),
        fates(sum(kept), sum(dropped)),
        "A kept sentence below the threshold was kept by another rule, such as a title's.",
    )


def before_after(label: str, whole: int, left: int, word: str) -> dict[str, str]:
    """A card of how many there were and how many are left."""
    share = f"{left / whole:.1%} {word}" if whole else "nothing"
    return {"label": label, "value": f"{whole:,} → {left:,}", "note": share}


def fates(kept: int, dropped: int) -> list[dict[str, str]]:
    """The legend of a histogram of kept and dropped rows."""
    return [
        {"cls": "kept", "name": f"kept ({kept:,})"},
        {"cls": "dropped", "name": f"dropped ({dropped:,})"},
    ]


def frame(
    job: Job, decided: Table, title: str, about: str, also: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of `ReportData` that every page fills alike, from the tables' manifests.

    `also` holds settings of the decision beside those of its method.
    """
    made = decided.manifest.options
    settings = {**made["options"], **(also or {})}
    manifests = ancestry(job)
    return {
        "title": title,
        "about": about,
        "created": max(m.created for m in manifests)[:19].replace("T", " "),
        "method": made["method"],
        "settings": ", ".join(f"{key}={value}" for key, value in settings.items()),
        "lineage": lineage_rows(manifests),
        "models": sorted({(f"{m.name}: {k}", v) for m in manifests for k, v in m.models.items()}),
        "libraries": libraries(manifests),
    }


def ancestry(job: Job) -> list[Manifest]:
    """Manifests of a job's inputs and of all they were made from, ancestors first."""
    found: dict[str, Manifest] = {}
    for key in job.inputs.values():
        for manifest in job.store.lineage(key):
            found.setdefault(manifest.key, manifest)
    return list(found.values())


def lineage_rows(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row a table, ancestors first."""
    names = {m.key: m.name for m in manifests}
    longest = max([m.seconds for m in manifests], default=0.0) or 1.0
    return [
        {
            "name": m.name,
            "step": m.step,
            "key": m.key[:12],
            "parents": ", ".join(names.get(key, key[:12]) for key in m.parents) or "source",
            "rows": f"{m.rows:,}",
            "kept": f"{m.kept:,}",
            "dropped": ", ".join(f"{n:,} {why}" for why, n in m.dropped.items()),
            "seconds": f"{m.seconds:.1f}",
            "share": f"{max(1.0, 100 * m.seconds / longest):.0f}",
        }
        for m in manifests
    ]


def libraries(manifests: Sequence[Manifest]) -> str:
    """Versions of the libraries that made the tables."""
    found: dict[str, str] = {}
    for manifest in manifests:
        found.update(manifest.libraries)
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
