"""The tables of `prompt_quality.py`: accuracies, paired differences, queries, the guard."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prompt_quality_data import TASKS
from prompt_quality_grid import Grid, Row, nats, paired, points, prompts_to, verdict
from sections import write_section

from prunery.pipelines.student_figures import Figure, figure

SEARCHES = ("greedy", "genetic", "particle_swarm", "random")
SPACES = ("pruned", "random", "full")
KINDS = {
    "pruned:gap": "`gap`",
    "pruned:negative_entropy": "`negative_entropy` (no labels)",
    "pruned:kl": "`kl` (no labels)",
    "halving": "`log_likelihood`, successive halving 4, 8, 16 shots",
    "published": "as published: `double_softmax`, strict percentile, whole-parent crossover",
}


# -- tables --------------------------------------------------------------------------------------


def task_table(grid: Grid) -> list[str]:
    """Tasks, their rows, and what prompts by hand do there."""
    lines = [
        "| task | words of the classes | rows: train, validation, test | no prompt |"
        " manual prompt | words that beat no prompt on the training rows |",
        "|---|---|---|---|---|---|",
    ]
    for task, its in TASKS.items():
        cells = [grid.cell("influence", key) for key in grid.keys("influence") if key[0] == task]
        if not cells:
            continue
        rows = cells[0]["rows"]
        test = [cell["accuracy"]["test"] for cell in cells]
        lines.append(
            f"| {task} | {', '.join(its.words)} | {rows['train']}, {rows['validation']},"
            f" {rows['test']:,} | {points(mean_of(test, 'empty'))} |"
            f" {points(mean_of(test, 'manual'))} (“{its.manual}”) |"
            f" {100 * statistics.mean(cell['positive'] for cell in cells):.0f} % |"
        )
    return lines


def mean_of(rows: Sequence[Row], name: str) -> Figure:
    """Mean alone: its spread would be about test rows that were left out."""
    return Figure(statistics.mean(row[name] for row in rows), math.nan, len(rows))


def accuracy_table(grid: Grid, prompts: int) -> list[str]:
    """Test accuracy of the best prompt by task, search and space."""
    lines = ["| task | search | pruned | random | full |", "|---|---|---|---|---|"]
    for task in TASKS:
        for search in SEARCHES:
            names = [grid.name(space, search) for space in SPACES]
            keys = [key for key in grid.keys(*names) if key[0] == task]
            if keys:
                made = [figure(grid.at(name, key, prompts)["test"] for key in keys)
                        for name in names]  # fmt: skip
                lines.append(f"| {task} | {search} | {' | '.join(map(points, made))} |")
    return lines


def difference_table(grid: Grid, mine: int | None, other: int | None) -> list[str]:
    """Pruned against the other spaces, paired by task and seed."""
    lines = [
        "| search | against | pairs | test accuracy | | training reward, nats | |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [s for s in SEARCHES if other == mine or s in grid.settings["longer"]]
    groups = [[search] for search in shown] + ([shown] if len(shown) > 1 else [])
    for group in groups:
        for space in SPACES[1:]:
            names = [(grid.name("pruned", one), grid.name(space, one)) for one in group]
            keys = grid.keys(*(name for pair in names for name in pair))
            if not keys:
                continue
            test, reward = (
                figure(
                    statistics.mean(
                        grid.at(ours, key, mine)[measure] - grid.at(theirs, key, other)[measure]
                        for ours, theirs in names
                    )
                    for key in keys
                )
                for measure in ("test", "reward")
            )
            lines.append(
                f"| {group[0] if len(group) == 1 else 'mean of all'} | {space} | {test.n} |"
                f" {points(test, sign=True)} | {verdict(test)} | {nats(reward)} |"
                f" {verdict(reward)} |"
            )
    return lines


def reach_table(grid: Grid, prompts: int, passed: int) -> list[str]:
    """Prompts until the training reward that the random space ended with."""
    lines = [
        "| search | random | pruned | pruned with its influence pass | full |"
        " reached by pruned, full |",
        "|---|---|---|---|---|---|",
    ]
    for search in SEARCHES:
        names = {space: grid.name(space, search) for space in SPACES}
        keys = grid.keys(*names.values())
        if not keys:
            continue
        took: dict[str, list[float]] = {space: [] for space in SPACES}
        for key in keys:
            goal = grid.at(names["random"], key, prompts)["reward"]
            for space, name in names.items():
                took[space].append(prompts_to(grid.cell(name, key), goal - 1e-6, prompts))
        middle = {space: statistics.median(values) for space, values in took.items()}
        reached = [f"{sum(map(math.isfinite, took[s]))} of {len(keys)}" for s in ("pruned", "full")]
        lines.append(
            f"| {search} | {count(middle['random'])} | {count(middle['pruned'])} |"
            f" {count(middle['pruned'] + passed)} | {count(middle['full'])} |"
            f" {', '.join(reached)} |"
        )
    return lines


def count(value: float) -> str:
    """A number of prompts."""
    return f"{value:,.0f}" if math.isfinite(value) else "never"


def kinds_table(grid: Grid, prompts: int) -> list[str]:
    """Other ways to prune, each with the genetic search, against the default and the control."""
    base, control = grid.name("pruned", "genetic"), grid.name("random", "genetic")
    lines = [
        "| words ranked by | kept words shared with the default | pairs | test accuracy |"
        " against the default | | against random words | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = {"pruned": "`log_likelihood` (the default)", **KINDS, "random": "nothing (random)"}
    for space, words in shown.items():
        name = grid.name(space, "genetic")
        keys = grid.keys(name, base, control)
        if not keys:
            continue
        cells = [grid.cell("influence", key)["shared"] for key in keys]
        shared = "" if space == "pruned" else (
            f"{100 * statistics.mean(cell[space] for cell in cells):.0f} %"
        )  # fmt: skip
        test = figure(grid.at(name, key, prompts)["test"] for key in keys)
        one, other = (paired(grid, name, rival, "test", prompts, prompts)
                      for rival in (base, control))  # fmt: skip
        lines.append(
            f"| {words} | {shared} | {len(keys)} | {100 * test.mean:.1f} |"
            f" {'|' if space == 'pruned' else f'{points(one, sign=True)} | {verdict(one)}'} |"
            f" {'|' if space == 'random' else f'{points(other, sign=True)} | {verdict(other)}'} |"
        )
    return lines


GUARDS: dict[str, Callable[[Row], float]] = {
    "always the found prompt": lambda row: row["test"]["found"],
    "guard by accuracy": lambda row: row["test"][row["chosen"]["accuracy"]],
    "guard by log likelihood": lambda row: row["test"][row["chosen"]["log_likelihood"]],
    "the better of empty and manual": lambda row: row["test"][row["rival"]],
}


def guard_table(grid: Grid, space: str) -> list[str]:
    """What the guard takes, and what that does to test accuracy."""
    lines = [
        "| search | pairs | found beats empty, manual, both | taken by accuracy, log likelihood | "
        + " | ".join(GUARDS)
        + " |",
        "|---|---|---|---|" + "---|" * len(GUARDS),
    ]
    for search in SEARCHES:
        name = grid.name(space, search)
        rows = [row for key in grid.keys(name) if (row := grid.judged(name, key))]
        if not rows:
            continue
        ahead = [
            [row["test"]["found"] > row["test"][rival] for rival in ("empty", "manual")]
            for row in rows
        ]
        beats = [sum(a for a, _ in ahead), sum(b for _, b in ahead), sum(map(all, ahead))]
        taken = [
            sum(row["chosen"][judge] == "found" for row in rows)
            for judge in ("accuracy", "log_likelihood")
        ]
        means = [f"{100 * statistics.mean(map(guard, rows)):.1f}" for guard in GUARDS.values()]
        lines.append(
            f"| {search} | {len(rows)} | {', '.join(map(str, beats))} |"
            f" {', '.join(map(str, taken))} | {' | '.join(means)} |"
        )
    return lines


def guard_claims(grid: Grid, space: str, search: str) -> list[str]:
    """Paired differences of the guards, for one search."""
    name = grid.name(space, search)
    rows = [row for key in grid.keys(name) if (row := grid.judged(name, key))]
    made = []
    for ours, theirs in (
        ("guard by accuracy", "always the found prompt"),
        ("guard by log likelihood", "always the found prompt"),
        ("always the found prompt", "the better of empty and manual"),
        ("guard by log likelihood", "the better of empty and manual"),
    ):
        gap = figure(GUARDS[ours](row) - GUARDS[theirs](row) for row in rows)
        if gap.n:
            made.append(f"- {ours} against {theirs} ({space}, {search}):"
                        f" {points(gap, sign=True)} points ({verdict(gap)}).")  # fmt: skip
    return made


def moved(grid: Grid) -> float:
    """How far the test accuracy of a prompt is from that with which it was searched."""
    rows = grid.every_judged()
    gaps = [abs(row["test"]["found"] - row["bfloat16"]) for row in rows]
    return statistics.mean(gaps) if gaps else math.nan


# -- the section ---------------------------------------------------------------------------------


def section(grid: Grid, vocabulary: Row) -> list[str]:
    """The section of RESULTS.md."""
    told = grid.settings
    prompts, words = told["prompts"], len(vocabulary["words"])
    passed = words + 1
    first = grid.cell("influence", grid.keys("influence")[0])
    halved = figure(
        cell["queries_halved"] / cell["queries"]
        for cell in (grid.cell("influence", key) for key in grid.keys("influence"))
    )
    return [
        "## Prompt search: what pruning its space is worth",
        "",
        "`python benchmarks/prompt_quality.py`, then `--judge`, then `--report`"
        f" ({told['machine']}; {told['versions']}). Black box: all-MiniLM-L6-v2 in"
        f" {told['dtype']}, the nearest description of a class, `{{prompt}} {{label}}`. 16 shots a"
        " class, five draws each (seeds 100, 13, 21, 42, 87) of six tasks; the seed draws the"
        " control's words and the search too. Rows whose text is empty, or stands in the training"
        " or validation rows, are left out of the parts behind those. subj's dev files repeat its"
        " training rows: its validation rows are 16 a class from the other seeds' training files,"
        " without this seed's training rows and all test rows.",
        "",
        f"The tokenizer's {vocabulary['entries']:,} entries have {vocabulary['fit']:,} words of"
        f" letters; k-means makes {words:,} clusters of them, and the word nearest to each centre"
        f" stands for it. Spaces: `pruned` (the {first['kept']} of highest influence),"
        f" `random` (as many drawn), `full` (all {words:,}, in an order shuffled by the seed)."
        f" Prompts of {told['length']} words (greedy: up to that), searched for by the mean log"
        f" likelihood of the training labels. ± are 95 % t-intervals over seeds, or over pairs of"
        " task and seed; the pairs of a task share their test rows, those of sst-2, mr and cr"
        " their words and random draws, so that they are a little too narrow. No correction for"
        " the number of comparisons.",
        "",
        *task_table(grid),
        "",
        f"### Equal search: {prompts:,} prompts in every space",
        "",
        "Test accuracy in per cent. Greedy in the full space does not get through its first round"
        f" of {words:,} words.",
        "",
        *accuracy_table(grid, prompts),
        "",
        "Pruned against the other spaces, paired by task and seed:",
        "",
        *difference_table(grid, prompts, prompts),
        "",
        f"### Equal total: {prompts + passed:,} prompts",
        "",
        f"The influence pass asks about {passed:,} prompts. Here the other spaces may ask about as"
        f" many as the pass and the search together: {prompts:,} prompts in the pruned space"
        f" against {prompts + passed:,}.",
        "",
        *difference_table(grid, prompts, prompts + passed),
        "",
        f"Prompts until the training reward that the random space ended with at {prompts:,};"
        " medians over pairs. The pass is paid once for all searches, lengths and seeds of a"
        f" search. Reached: within {prompts:,}.",
        "",
        *reach_table(grid, prompts, passed),
        "",
        "### Other influences, and fewer rows",
        "",
        f"Genetic search, {prompts:,} prompts. Successive halving asks"
        f" {100 * halved.mean:.1f} % of the queries of the full pass.",
        "",
        *kinds_table(grid, prompts),
        "",
        "### The guard",
        "",
        f"Pruned space, the best of {prompts:,} prompts, scored again in float32 (which moves the"
        f" test accuracy of a prompt by {100 * moved(grid):.1f} points on average). The guard takes"
        " the found prompt where it beats the empty and the manual one on the validation rows by"
        " over one standard error, and else the better of these two.",
        "",
        *guard_table(grid, "pruned"),
        "",
        *guard_claims(grid, "pruned", "genetic"),
    ]


def machine() -> dict[str, str]:
    """What a run is measured on."""
    names = ("torch", "transformers", "scikit-learn", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return {
        "machine": f"{platform.machine()}, 1 thread",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def slim(cell: Row) -> dict[str, Any]:
    """A cell without what follows from the rest of it: for the results file."""
    made = {name: value for name, value in cell.items() if name not in ("space", "search")}
    if "marks" in made:
        made["trace"] = [[at, round(reward, 4)] for at, reward in made["trace"]]
        keep = ("prompts", "reward", "test")
        best = made["marks"][-1]["prompt"]
        made["marks"] = [{name: mark[name] for name in keep} for mark in made["marks"]]
        made["prompt"] = best
    return made


def write_report(out: Path, here: Path) -> None:
    """Results file and the section of RESULTS.md."""
    cells, judged = read_lines(out / "cells.jsonl"), read_lines(out / "judged.jsonl")
    settings = json.loads((out / "settings.json").read_text())
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    told = {
        "settings": settings,
        "vocabulary": {**vocabulary, "words": len(vocabulary["words"])},
        "cells": [slim(cell) for cell in cells],
        "judged": judged,
    }
    (here / "results").mkdir(exist_ok=True)
    path = here / "results" / "prompt_quality.json"
    path.write_text(json.dumps(told, separators=(",", ":")).replace('{"task"', '\n{"task"') + "\n")
    text = section(Grid(cells, judged, settings), vocabulary)
    write_section(here / "RESULTS.md", "prompt-quality", "\n".join(text))
