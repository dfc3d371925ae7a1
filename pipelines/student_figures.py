"""Accuracy of students over seeds: means, intervals, and differences paired by seed.

All intervals are 95 % t intervals over seeds. They speak of other seeds on the same test rows,
not of other test rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError

RANDOM, CHOSEN, FULL = "random", "chosen", "full"
_SEEDS_TO_TELL = 3  # below that an interval says next to nothing, or, by rounding, too much


class Line(NamedTuple):
    """What a student was trained on: how its rows were taken, and whether a teacher helped."""

    selection: str
    distilled: bool

    @property
    def name(self) -> str:
        """In words."""
        rows = "full data" if self.selection == FULL else self.selection
        return f"{rows} + distilled" if self.distilled else rows


LINES = tuple(Line(rows, taught) for rows in (RANDOM, CHOSEN) for taught in (False, True))
FULL_LINE = Line(FULL, False)
_COMPARED = (
    ("Chosen against random rows, both distilled", Line(CHOSEN, True), Line(RANDOM, True)),
    ("Chosen against random rows, labels alone", Line(CHOSEN, False), Line(RANDOM, False)),
    ("Distilled against labels alone, random rows", Line(RANDOM, True), Line(RANDOM, False)),
    ("Distilled against labels alone, chosen rows", Line(CHOSEN, True), Line(CHOSEN, False)),
    ("Random rows distilled against full data with labels alone", Line(RANDOM, True), FULL_LINE),
    ("Chosen rows distilled against full data with labels alone", Line(CHOSEN, True), FULL_LINE),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over `n` seeds; `half` the length of its interval each way, NaN for one seed."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        spread = f" ± {self.half:.3f}" if math.isfinite(self.half) else ""
        return f"{self.mean:.3f}{spread}"

    @property
    def percent(self) -> str:
        """As `str`, in percent."""
        spread = f" ± {100 * self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{100 * self.mean:.1f}{spread}%"


def figure(values: Iterable[float]) -> Figure:
    """Mean and half the 95 % t interval: t(0.975, n - 1) * sd / sqrt(n), sd over n - 1."""
    from scipy.special import stdtrit

    given = np.asarray(list(values), np.float64)
    n = len(given)
    if not n:
        return Figure(math.nan, math.nan, 0)
    mean = float(given.mean())
    if n == 1:
        return Figure(mean, math.nan, n)
    return Figure(mean, float(stdtrit(n - 1, 0.975) * given.std(ddof=1) / math.sqrt(n)), n)


class Grid:
    """The students of a table `STUDENTS`, by kept fraction, line and seed.

    Raises
    ------
    InputError
        Two students have the same fraction, selection, distillation and seed.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._cells: dict[tuple[float, Line], dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            line = Line(row["selection"], row["distilled"])
            cell = self._cells.setdefault((fraction_of(row["fraction"]), line), {})
            if row["seed"] in cell:
                raise InputError(
                    f"two students are {line.name} at {percent(row['fraction'])} with seed"
                    f" {row['seed']}; one for each seed was expected. Give each its own seed."
                )
            cell[row["seed"]] = row

    @property
    def fractions(self) -> list[float]:
        """Kept fractions below the full data, ascending."""
        return sorted({f for f, line in self._cells if line.selection != FULL})

    def students(self, fraction: float, line: Line) -> list[Mapping[str, Any]]:
        """The students of a cell, by seed; those on full data whatever the fraction."""
        cell = self._cell(fraction, line)
        return [cell[seed] for seed in sorted(cell)]

    def accuracy(self, fraction: float, line: Line) -> Figure:
        """Accuracy on the test rows, 0 to 1."""
        return figure(row["accuracy"] for row in self.students(fraction, line))

    def difference(self, fraction: float, line: Line, other: Line) -> Figure:
        """Accuracy of `line` minus that of `other`, over the seeds that both have."""
        ours, theirs = self._cell(fraction, line), self._cell(fraction, other)
        return figure(
            ours[seed]["accuracy"] - theirs[seed]["accuracy"]
            for seed in sorted(ours.keys() & theirs.keys())
        )

    def _cell(self, fraction: float, line: Line) -> Mapping[int, Mapping[str, Any]]:
        if line.selection == FULL:
            found = [cell for (_, of), cell in self._cells.items() if of == line]
            return found[0] if found else {}
        return self._cells.get((fraction, line), {})

    def best(self, fraction: float) -> tuple[Line, Figure] | None:
        """The line of the highest mean at a fraction, and that mean."""
        found = [(line, self.accuracy(fraction, line)) for line in LINES]
        found = [(line, figure) for line, figure in found if figure.n]
        return max(found, key=lambda pair: pair[1].mean, default=None)

    def full(self) -> Figure:
        """Accuracy of the students on full data with labels alone, n = 0 where there is none."""
        return self.accuracy(1.0, FULL_LINE)


def fraction_of(value: float) -> float:
    """A float32 fraction as the number that was meant."""
    return round(float(value), 6)


def percent(fraction: float) -> str:
    """A fraction in percent, without needless digits."""
    return f"{100 * fraction:.4g}%"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two lines held against each other at each fraction, by differences paired by seed."""

    name: str
    differences: Mapping[float, Figure]

    def sentence(self) -> str:
        """Where the first is higher or lower, and where the seeds cannot tell."""
        places: dict[str, list[str]] = {}
        for fraction, found in self.differences.items():
            places.setdefault(verdict(found), []).append(percent(fraction))
        parts = [f"{words} {', '.join(places[words])}" for words in VERDICTS if words in places]
        return f"{self.name}: {'; '.join(parts)}."


VERDICTS = (
    "higher at",
    "lower at",
    "no difference that the seeds can tell at",
    "too few seeds to tell at",
)


def comparisons(grid: Grid) -> list[Comparison]:
    """Which lines differ and where; those that no seed allows are left out."""
    made = []
    for name, line, other in _COMPARED:
        found = {f: grid.difference(f, line, other) for f in grid.fractions}
        if any(difference.n for difference in found.values()):
            there = {f: difference for f, difference in found.items() if difference.n}
            made.append(Comparison(name, there))
    return made


def verdict(difference: Figure) -> str:
    """One of `VERDICTS`.

    Higher or lower only where the interval leaves zero out, and three seeds or more were
    compared.
    """
    higher, lower, alike, few = VERDICTS
    if difference.n < _SEEDS_TO_TELL:
        return few
    if difference.mean - difference.half > 0:
        return higher
    return lower if difference.mean + difference.half < 0 else alike


def caution(grid: Grid, test_rows: int) -> str:
    """What the intervals do not say."""
    words = (
        "Differences in points of test accuracy, paired by seed on the same test rows, with their"
        " 95 % t intervals; not corrected for the number of comparisons."
    )
    full = grid.full()
    if full.n and test_rows:
        noise = 1.96 * math.sqrt(max(full.mean * (1 - full.mean), 0.0) / test_rows)
        words += (
            f" There are {test_rows:,} test rows: other rows of the same kind would move an"
            f" accuracy of {100 * full.mean:.1f}% by about ± {100 * noise:.1f} points, which no"
            " number of seeds shows."
        )
    return words


def summary(grid: Grid) -> list[dict[str, Any]]:
    """One plain row for each line of each fraction, full data last."""
    cells = [(f, line) for f in grid.fractions for line in LINES]
    made = []
    for fraction, line in [*cells, (1.0, FULL_LINE), (1.0, Line(FULL, True))]:
        found = grid.accuracy(fraction, line)
        if found.n:
            made.append(
                {
                    "fraction": fraction,
                    "selection": line.selection,
                    "distilled": line.distilled,
                    "accuracy": found.mean,
                    "interval": found.half if math.isfinite(found.half) else None,
                    "seeds": found.n,
                }
            )
    return made


def summary_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of `summary` in words: a line a fraction, the distilled lines where there are."""
    full = [row for row in rows if row["selection"] == FULL and not row["distilled"]]
    made = []
    for fraction in sorted({row["fraction"] for row in rows if row["selection"] != FULL}):
        parts = []
        for selection in (CHOSEN, RANDOM):
            found = [
                row for row in rows if row["selection"] == selection and row["fraction"] == fraction
            ]
            parts += [_said(row) for row in found if row["distilled"] or len(found) == 1]
        parts += [_said(row).replace("full data", "full") for row in full]
        made.append(f"{percent(fraction)} {', '.join(parts)}")
    return made


def _said(row: Mapping[str, Any]) -> str:
    half = math.nan if row["interval"] is None else row["interval"]
    name = Line(row["selection"], row["distilled"]).name
    return f"{name} {Figure(row['accuracy'], half, row['seeds'])}"
