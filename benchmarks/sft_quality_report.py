"""The tables of `sft_quality.py`: losses, paired differences and who wins."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sections import write_section

#: What a method must beat: the same share of samples, of tokens, or of both, drawn at random.
CONTROL = {
    "ifd": "random_samples",
    "longest": "random_samples",
    "excess_loss": "random_tokens",
    "sstoken": "random_tokens",
    "qtuning": "random_both",
}
ORDER = (
    "random_samples",
    "ifd",
    "longest",
    "random_tokens",
    "excess_loss",
    "sstoken",
    "random_both",
    "qtuning",
)
DRAWS = 2000
Run = Mapping[str, Any]


def mean_loss(run: Run) -> float:
    """Nats a held-out answer token."""
    return sum(run["loss_sum"]) / sum(run["loss_count"])


def difference(
    runs: Sequence[Run], others: Sequence[Run], seed: int = 0
) -> tuple[float, float, float]:
    """Mean loss of `runs` minus that of `others`, and its 95 % interval.

    The two share seeds and held-out rows. Bootstrap: seeds are drawn, then rows within a seed.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for run, other in zip(runs, others, strict=True):
        gap = np.array(run["loss_sum"]) - np.array(other["loss_sum"])
        pairs.append((gap, np.array(run["loss_count"], float)))
    point = float(np.mean([gap.sum() / count.sum() for gap, count in pairs]))
    draws = []
    for _ in range(DRAWS):
        made = []
        for s in rng.integers(len(pairs), size=len(pairs)):
            gap, count = pairs[s]
            rows = rng.integers(len(gap), size=len(gap))
            made.append(gap[rows].sum() / count[rows].sum())
        draws.append(np.mean(made))
    low, high = np.quantile(draws, [0.025, 0.975])
    return point, float(low), float(high)


def verdict(low: float, high: float) -> str:
    """In a word: lower loss is better."""
    return "wins" if high < 0 else "loses" if low > 0 else "ties"


def table(runs: Sequence[Run], name: str) -> list[str]:
    """Markdown lines of one data set."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["data"] == name:
            found.setdefault((run["method"], run["budget"]), []).append(run)
    if ("full", 1.0) not in found:
        return []
    full, none = found["full", 1.0], found.get(("none", 0.0), [])
    losses = [mean_loss(run) for run in full]
    lines = [
        f"### {name}",
        "",
        f"Base model {np.mean([mean_loss(r) for r in none]):.3f}, full data"
        f" {np.mean(losses):.3f} nats a token ({len(full)} seeds, sd {np.std(losses, ddof=1):.3f},"
        f" {full[0]['pool_tokens']:,} trained tokens, {full[0]['steps']:.0f} steps).",
        "",
        "| budget | method | trained tokens | steps | held-out loss | sd | against random"
        " [95 %] | verdict | against full [95 %] |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget in sorted({b for _, b in found if 0 < b < 1}):
        for method in ORDER:
            own = found.get((method, budget))
            if own is None:
                continue
            losses = [mean_loss(run) for run in own]
            control, word = "", ""
            if method in CONTROL:
                point, low, high = difference(own, found[CONTROL[method], budget])
                control = f"{point:+.3f} [{low:+.3f}, {high:+.3f}]"
                word = verdict(low, high)
            point, low, high = difference(own, full)
            lines.append(
                f"| {budget:.1%} | `{method}` | {np.mean([r['trained_tokens'] for r in own]):,.0f}"
                f" | {np.mean([r['steps'] for r in own]):.0f} | {np.mean(losses):.3f}"
                f" | {np.std(losses, ddof=1):.3f} | {control} | {word}"
                f" | {point:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )
    lines.append("")
    return lines


def write_report(runs: Sequence[Run], size: Mapping[str, Any], here: Path) -> None:
    """Results file, the section of RESULTS.md, and the tables on the terminal."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    shown = [
        {key: value for key, value in run.items() if not isinstance(value, list)}
        | {"loss": mean_loss(run)}
        for run in runs
    ]
    told = {"machine": machine, "versions": versions, "size": dict(size), "runs": shown}
    (here / "results" / "sft_quality.json").write_text(json.dumps(told, indent=1) + "\n")
    given = [word for word in sys.argv[1:] if word != "--report-only"]
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(given)}".strip()
    lines = [
        "## Fine-tuning selection: held-out loss at equal trained tokens",
        "",
        f"`{command}` ({machine}; {versions}). "
        + ", ".join(f"{key} {value}" for key, value in size.items())
        + ". Lower loss is better. `wins`: the 95 % interval of the difference to random at the"
        " same budget (bootstrap over seeds and held-out rows, paired) lies below 0. `excess_loss`"
        " is Rho-1. Every method drops whole samples, tokens, or both; steps differ because a"
        " dropped sample makes no batch.",
        "",
    ]
    for name in sorted({run["data"] for run in runs}):
        lines += table(runs, name)
    write_section(here / "RESULTS.md", "sft_quality", "\n".join(lines))
    print("\n".join(lines))
