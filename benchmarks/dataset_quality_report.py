"""The tables of `dataset_quality.py`: accuracies, paired differences, and the claims tested."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import sklearn
import torch
from sections import write_section

from prunery.pipelines.student_figures import figure

Run = Mapping[str, Any]
Cell = tuple[str, float, bool]
RANDOM, FULL = "random", "full"


def by_cell(runs: Iterable[Run]) -> dict[Cell, list[Run]]:
    """Runs of one data set by method, fraction and distillation, in the order of seeds.

    A cell that lacks a seed (a run that was stopped) is left out.
    """
    found: dict[Cell, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault((run["method"], run["fraction"], run["distilled"]), []).append(run)
    seeds = max(map(len, found.values()), default=0)
    return {cell: own for cell, own in found.items() if len(own) == seeds}


def mean(runs: Sequence[Run], key: str = "accuracy") -> float:
    """Mean of a figure over seeds."""
    return float(np.mean([run[key] for run in runs]))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval; the whole line where there is one value."""
    found = figure(values)
    half = found.half if found.n > 1 else np.inf
    return found.mean, found.mean - half, found.mean + half


def gap(runs: Sequence[Run], others: Sequence[Run]) -> tuple[float, float, float]:
    """Mean of the differences of accuracy, seed by seed, and its interval."""
    pairs = zip(runs, others, strict=True)
    return interval([run["accuracy"] - other["accuracy"] for run, other in pairs])


def verdict(low: float, high: float) -> str:
    """In a word: higher accuracy is better."""
    return "wins" if low > 0 else "loses" if high < 0 else "ties"


def points(value: float) -> str:
    """Accuracy as a percentage."""
    return f"{100 * value:.1f}"


def gap_text(found: tuple[float, float, float]) -> str:
    """A difference with its interval, in points."""
    point, low, high = (100 * value for value in found)
    return f"{point:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(cells: Mapping[Cell, Sequence[Run]], order: Sequence[str]) -> list[str]:
    """Markdown lines: a line for each fraction and method."""
    lines = [
        "| kept | method | wrong labels kept | no teacher | against random [95 %] | | teacher"
        " | alpha | against random [95 %] | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for fraction in sorted({f for _, f, _ in cells if f < 1}):
        for method in order:
            plain, taught = (
                cells.get((method, fraction, False)),
                cells.get((method, fraction, True)),
            )
            if plain is None or taught is None:
                continue
            words = ["", "", "", ""]
            if method != RANDOM:
                for place, own, distilled in ((0, plain, False), (2, taught, True)):
                    found = gap(own, cells[RANDOM, fraction, distilled])
                    words[place : place + 2] = [gap_text(found), verdict(*found[1:])]
            lines.append(
                f"| {fraction:.0%} | `{method}` | {points(mean(plain, 'wrong'))} %"
                f" | {points(mean(plain))} | {words[0]} | {words[1]}"
                f" | {points(mean(taught))} | {mean(taught, 'alpha'):.2f}"
                f" | {words[2]} | {words[3]} |"
            )
    return lines


def claims(cells: Mapping[Cell, Sequence[Run]], noise: float) -> list[str]:
    """What the literature claims, and what holds here."""
    made = []
    full = cells[FULL, 1.0, False]
    half = cells.get((RANDOM, 0.5, True))
    if half:
        found = gap(half, full)
        made.append(
            f"- Random 50 % with a teacher against full data without: {gap_text(found)} points"
            f" ({verdict(*found[1:])})."
        )
    hard = []
    for fraction in sorted({f for m, f, _ in cells if m == "el2n"}):
        found = gap(cells[RANDOM, fraction, True], cells["el2n", fraction, True])
        hard.append(f"{fraction:.0%}: {gap_text(found)}")
    if hard:
        made.append(f"- Random against `el2n`, both with a teacher: {'; '.join(hard)}.")
    if noise:
        for method in ("ccs", "aum", "knn_shapley"):
            lead = [
                f"{f:.0%}: {gap_text(gap(cells[method, f, True], cells[RANDOM, f, True]))}"
                for f in sorted({f for m, f, _ in cells if m == method})
            ]
            if lead:
                made.append(f"- `{method}` against random, both with a teacher: {'; '.join(lead)}.")
    return made


def section(
    runs: Sequence[Run], data: str, noise: float, order: Sequence[str], batch: int
) -> list[str]:
    """The tables of one set at one share of noise."""
    cells = by_cell(run for run in runs if run["data"] == data and run["noise"] == noise)
    full = cells[FULL, 1.0, False]
    plain, taught = (
        interval([run["accuracy"] for run in cells[FULL, 1.0, distilled]])
        for distilled in (False, True)
    )
    return [
        f"### {data}, {noise:.0%} wrong labels",
        "",
        f"{full[0]['train_rows']:,} training rows, {full[0]['test_rows']:,} test rows,"
        f" {full[0]['steps']:,} steps of {batch} rows a student"
        f" ({full[0]['steps'] * batch / full[0]['train_rows']:.1f} passes over the full data),"
        f" {len(full)} seeds. Full data:"
        f" {points(plain[0])} ± {points(plain[2] - plain[0])} without a teacher,"
        f" {points(taught[0])} ± {points(taught[2] - taught[0])} with"
        f" (alpha {mean(cells[FULL, 1.0, True], 'alpha'):.2f}).",
        "",
        *table(cells, order),
        "",
        *claims(cells, noise),
        "",
    ]


def write_report(runs: Sequence[Run], sets: Mapping[str, Any], here: Path) -> None:
    """Results file and the section of RESULTS.md."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    order = [RANDOM, *(name for name in methods if name not in (RANDOM, FULL))]
    machine = f"{platform.machine()}, 1 thread a run"
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, faiss"
        f" {faiss.__version__}, scikit-learn {sklearn.__version__}"
    )
    told = {"machine": machine, "versions": versions, "sets": dict(sets), "runs": list(runs)}
    (here / "results").mkdir(exist_ok=True)
    (here / "results" / "dataset_quality.json").write_text(json.dumps(told, indent=1) + "\n")
    lines = [
        "## Dataset pruning and distillation: test accuracy at equal steps",
        "",
        "`python benchmarks/dataset_quality.py --data NAME --noise SHARE`, with the `--fractions`"
        " and `--methods` of the tables, for each heading, then"
        f" `--report` ({machine}; {versions})."
        " Accuracy in per cent. Differences are paired by"
        " seed, with 95 % t-intervals over seeds; `wins` and `loses` where the interval leaves out"
        " 0 (no correction for the number of comparisons). The teacher is the same network trained"
        " on all rows, wrong labels included; alpha was chosen on held-out kept rows.",
        "",
    ]
    for data, noise in sorted({(run["data"], run["noise"]) for run in runs}):
        lines += section(runs, data, noise, order, sets[data]["batch"])
    write_section(here / "RESULTS.md", "dataset-quality", "\n".join(lines))
