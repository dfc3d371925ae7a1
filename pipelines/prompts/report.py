"""What the page of a prompt search shows of the search, its verdict and its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import svg
from ..report import Chart
from .report_words import REWARD_WORDS, clipped
from .tables import TEST, VALIDATION

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]

#: Why a search ended, in words.
STOPS = {
    "prompts": "its number of prompts",
    "queries": "max_queries",
    "tokens": "max_tokens",
    "cost": "max_cost",
    "finished": "having nothing more to ask",
}
CONTENDERS = ("found", "control", "manual", "empty")
_PROMPTS = 10
_POINTS = 400  # of a line of the best so far


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step asked: queries are (prompt, row) pairs that it was charged for."""

    name: str
    role: str
    queries: int
    read: int
    written: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a million tokens; None where there is no price."""

    input: float | None = None
    output: float | None = None

    @property
    def known(self) -> bool:
        """Whether there is any price."""
        return self.input is not None or self.output is not None

    def of(self, read: int, written: int) -> float:
        """What so many tokens cost."""
        return (read * (self.input or 0.0) + written * (self.output or 0.0)) / 1e6


def cost_of(
    name: str, role: str, table: pa.Table, seconds: float, *, remote: bool, finalists: int = 1
) -> Cost:
    """The cost of a step from its rows: of the influence, a search or the verdict, by its role.

    The tables have the sum of tokens read and written. A model on this machine writes none; an
    endpoint is taken to write one an answer, which is what it is asked for. `finalists` of a
    verdict are asked about on the validation rows too, with as many tokens each as the one that
    the table knows.
    """
    if role in ("search", "control"):
        last = table.slice(max(0, table.num_rows - 1))
        queries, tokens = _total(last, "queries"), _total(last, "tokens")
    elif role == "verdict":
        queries, tokens = _total(table, "rows"), _total(table, "tokens")
        for row in table.to_pylist():
            if finalists > 1 and (row["contender"], row["part"]) == ("found", VALIDATION):
                queries += finalists * row["rows"]
                tokens += finalists * row["tokens"]
    else:
        queries, tokens = _total(table, "rows_seen"), _total(table, "tokens")
    written = min(queries, tokens) if remote else 0
    return Cost(name, role, queries, tokens - written, written, seconds)


def _total(table: pa.Table, name: str) -> int:
    return int(np.sum(table.column(name).to_numpy(), dtype=np.int64)) if table.num_rows else 0


# -- the head ----------------------------------------------------------------------------------


def cards(
    stages: Sequence[tuple[str, int]],
    costs: Sequence[Cost],
    prices: Prices,
    verdict: Sequence[Row],
) -> list[dict[str, str]]:
    """Words by stage, what it cost, and what came of it."""
    made = [
        {
            "label": "Words",
            "value": " → ".join(f"{count:,}" for _, count in stages),
            "note": " → ".join(name for name, _ in stages),
        },
        _sum_card("Queries", [(c.name, c.queries) for c in costs]),
        _sum_card("Tokens", [(c.name, c.tokens) for c in costs]),
    ]
    if prices.known:
        money = [(cost.name, prices.of(cost.read, cost.written)) for cost in costs]
        made.append(
            {
                "label": "Money",
                "value": _money(sum(spent for _, spent in money)),
                "note": ", ".join(f"{name} {_money(spent)}" for name, spent in money),
            }
        )
    tested = {row["contender"]: row for row in verdict if row["part"] == TEST}
    chosen = next((row for row in tested.values() if row["chosen"]), None)
    if chosen is not None:
        others = [name for name in ("empty", "manual") if name in tested]
        rest = [f"{name} {accuracy(tested[name])}" for name in others if tested[name] != chosen]
        made.append(
            {
                "label": "Test accuracy",
                "value": f"{100 * chosen['accuracy']:.1f}%",
                "note": ", ".join([f"± {100 * chosen['accuracy_error']:.1f} s.e.", *rest]),
            }
        )
    taken = next((row for row in verdict if row["chosen"]), None)
    if taken is not None:
        made.append(
            {
                "label": "Prompt taken",
                "value": taken["contender"],
                "note": clipped(taken["prompt"]) or "no prompt at all",
            }
        )
    return made


def _sum_card(label: str, parts: Sequence[tuple[str, int]]) -> dict[str, str]:
    note = ", ".join(f"{name} {count:,}" for name, count in parts)
    return {"label": label, "value": f"{sum(count for _, count in parts):,}", "note": note}


def accuracy(row: Row) -> str:
    """Accuracy of a row of the verdict and its standard error, in percent."""
    return f"{100 * row['accuracy']:.1f}% ± {100 * row['accuracy_error']:.1f}"


def sentence(verdict: Sequence[Row], judge: str) -> str:
    """Which prompt was taken, and why."""
    taken = next((row for row in verdict if row["chosen"]), None)
    if taken is None:
        return "No prompt was taken: the table of the verdict is empty."
    leads = [
        f"{lead(row, judge)} over the {row['contender']} one"
        for row in _ordered(verdict)
        if row["part"] == VALIDATION and row["contender"] in ("empty", "manual")
    ]
    words = f"The {taken['contender']} prompt is taken: {taken['reason'].rstrip('.')}."
    if leads:
        words += f" Lead of the found prompt on the validation rows: {', '.join(leads)}."
    return words


def lead(row: Row, judge: str) -> str:
    """Lead of the found prompt over a row's, with its standard error."""
    if judge == "accuracy":
        return f"{100 * row['lead_of_found']:+.1f} ± {100 * row['lead_error']:.1f} points"
    return f"{row['lead_of_found']:+.3f} ± {row['lead_error']:.3f} nats"


# -- prompts -----------------------------------------------------------------------------------


def search_chart(searches: Sequence[tuple[str, pa.Table]], reward: str) -> Chart | None:
    """Best reward so far against queries, a line a search; None where nothing was asked."""
    series, notes = [], []
    for slot, (name, table) in enumerate(searches):
        if not table.num_rows:
            notes.append(f"{name}: asked about no prompt.")
            continue
        queries = table.column("queries").to_numpy().astype(np.float64)
        best = table.column("best").to_numpy().astype(np.float64)
        points = climb(queries, best)
        top = next(i for i, value in enumerate(best) if value == best[-1])
        series.append(svg.Series(name, points, slot, (float(queries[top]), float(best[top]))))
        stop = table.column("stop")[-1].as_py()
        notes.append(
            f"{name}: {table.num_rows:,} prompts, best after {top + 1:,}"
            + (f", ended by {STOPS.get(stop, stop)}." if stop else ".")
        )
    if not series:
        return None
    ends = [y for line in series for _, y in line.points]
    picture = svg.line_chart(
        series,
        x_label="queries: prompts x training rows",
        y_label="best reward so far",
        label="Best reward so far against the number of queries, one line a search",
        x_range=(0.0, max(x for line in series for x, _ in line.points)),
        y_range=svg.around(ends, (-math.inf, math.inf), least=1e-3),
        percent_x=False,
        percent_y=False,
    )
    legend = [{"cls": f"s{line.slot}", "name": line.name} for line in series]
    measured = f"Reward on the training rows: {REWARD_WORDS.get(reward, reward)}. "
    return Chart("Best reward against queries", picture, legend, measured + " ".join(notes))


def climb(x: Floats, y: Floats) -> list[svg.Point]:
    """A rising line of steps as its corners, the first and the last point among them."""
    rises = np.flatnonzero(np.diff(y) > 0) + 1
    if len(rises) > _POINTS:
        rises = rises[np.linspace(0, len(rises) - 1, _POINTS).round().astype(int)]
    made = [(float(x[0]), float(y[0]))]
    for place in rises:
        made += [(float(x[place]), made[-1][1]), (float(x[place]), float(y[place]))]
    if x[-1] > made[-1][0]:
        made.append((float(x[-1]), made[-1][1]))
    return made


def prompt_rows(search: pa.Table, taken: str | None) -> list[dict[str, Any]]:
    """The ten prompts of highest reward, the earlier asked first among equals, none twice."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(search.to_pylist()):
        rows.setdefault(row["prompt"], {**row, "number": number})
    top = sorted(rows.values(), key=lambda row: (-row["reward"], row["number"]))[:_PROMPTS]
    return [
        {
            "prompt": clipped(row["prompt"]),
            "reward": f"{row['reward']:.4g}",
            "accuracy": f"{100 * row['accuracy']:.1f}%",
            "round": f"{row['round'] + 1:,}",
            "number": f"{row['number'] + 1:,}",
            "taken": row["prompt"] == taken,
        }
        for row in top
    ]


def verdict_rows(verdict: Sequence[Row], judge: str) -> list[dict[str, Any]]:
    """A line a contender: accuracy on both parts, and by how much the found prompt leads."""
    made: dict[str, dict[str, Any]] = {}
    for row in _ordered(verdict):
        name = row["contender"]
        line = made.setdefault(
            name,
            {
                "name": name,
                "prompt": clipped(row["prompt"]),
                "chosen": False,
                "parts": {part: {"accuracy": "", "lead": ""} for part in (VALIDATION, TEST)},
            },
        )
        line["chosen"] |= row["chosen"]
        line["parts"][row["part"]] = {
            "accuracy": accuracy(row),
            "rows": f"{row['rows']:,}",
            "lead": "" if name == "found" else lead(row, judge),
        }
    return list(made.values())


def rows_of_parts(verdict: Sequence[Row]) -> dict[str, str]:
    """Rows of the validation and the test part."""
    return {part: f"{max([r['rows'] for r in verdict if r['part'] == part], default=0):,}"
            for part in (VALIDATION, TEST)}  # fmt: skip


def _ordered(verdict: Sequence[Row]) -> list[Row]:
    return sorted(verdict, key=lambda row: (CONTENDERS.index(row["contender"]), row["part"]))


# -- cost --------------------------------------------------------------------------------------


def cost_rows(costs: Sequence[Cost], prices: Prices) -> list[dict[str, Any]]:
    """A line a step, and their sum."""
    total = Cost(
        "all",
        "",
        sum(cost.queries for cost in costs),
        sum(cost.read for cost in costs),
        sum(cost.written for cost in costs),
        sum(cost.seconds for cost in costs),
    )
    return [
        {
            "name": cost.name,
            "role": cost.role,
            "queries": f"{cost.queries:,}",
            "tokens": f"{cost.tokens:,}",
            "money": _money(prices.of(cost.read, cost.written)) if prices.known else "",
            "seconds": f"{cost.seconds:.1f}",
        }
        for cost in (*costs, total)
    ]


def price_note(costs: Sequence[Cost]) -> str:
    """How money was counted."""
    if any(cost.written for cost in costs):
        return "Money counts one written token an answer, and all others as read."
    return "Money counts all tokens as read."


def _money(value: float) -> str:
    if 0 < value < 1e-4:
        return "< 0.0001"
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.3g}"
