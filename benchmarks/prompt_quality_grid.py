"""The cells of a run of `prompt_quality.py`, and how two of them compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prunery.pipelines.student_figures import Figure, figure

Row = Mapping[str, Any]
Key = tuple[str, int]  # task, seed


class Grid:
    """Every cell of a run, by name, task and seed; and how its prompts were judged."""

    def __init__(self, rows: Iterable[Row], judged: Iterable[Row], settings: Row) -> None:
        self.settings = settings
        self._cells = {(row["name"], row["task"], row["seed"]): row for row in rows}
        self._judged = {(row["name"], row["task"], row["seed"]): row for row in judged}
        self.length = settings["length"]

    def name(self, space: str, search: str) -> str:
        """Of a cell."""
        return f"{space}/{search}/{self.length}"

    def keys(self, *names: str) -> list[Key]:
        """Tasks and seeds that have all of these cells."""
        every = sorted({(task, seed) for _, task, seed in self._cells})
        return [key for key in every if all((name, *key) in self._cells for name in names)]

    def cell(self, name: str, key: Key) -> Row:
        """One cell."""
        return self._cells[(name, *key)]

    def judged(self, name: str, key: Key) -> Row | None:
        """What the guard made of the prompt found there, if it was asked."""
        return self._judged.get((name, *key))

    def every_judged(self) -> list[Row]:
        """All that was judged."""
        return list(self._judged.values())

    def at(self, name: str, key: Key, prompts: int | None = None) -> Row:
        """The best after so many prompts: the last mark up to them; None for the end."""
        marks = self.cell(name, key)["marks"]
        if prompts is None:
            return marks[-1]  # type: ignore[no-any-return]
        return [mark for mark in marks if mark["prompts"] <= prompts][-1]  # type: ignore[no-any-return]


def points(found: Figure, *, sign: bool = False) -> str:
    """A figure of accuracy in points; with its sign and two decimals, a difference."""
    mean = f"{100 * found.mean:+.2f}" if sign else f"{100 * found.mean:.1f}"
    half = f" ± {100 * found.half:.{2 if sign else 1}f}" if math.isfinite(found.half) else ""
    return mean + half


def nats(found: Figure) -> str:
    """A difference of rewards."""
    spread = f" ± {found.half:.3f}" if math.isfinite(found.half) else ""
    return f"{found.mean:+.3f}{spread}"


def verdict(found: Figure) -> str:
    """In a word: higher is better."""
    if not math.isfinite(found.half):
        return "too few"
    return "wins" if found.mean > found.half else "loses" if found.mean < -found.half else "ties"


def paired(
    grid: Grid, ours: str, theirs: str, measure: str, mine: int | None, other: int | None
) -> Figure:
    """Mean difference over the tasks and seeds that have both, after so many prompts each."""
    return figure(
        grid.at(ours, key, mine)[measure] - grid.at(theirs, key, other)[measure]
        for key in grid.keys(ours, theirs)
    )


def prompts_to(row: Row, reward: float, most: float = math.inf) -> float:
    """How many prompts a search asked until its best reached a reward; inf if not by `most`."""
    return next((float(at) for at, best in row["trace"] if best >= reward and at <= most), math.inf)
