"""Perplexity against sparsity and bits for every method, with three choices of calibration rows.

    python benchmarks/compression_quality.py
    python benchmarks/compression_quality.py --model llama --methods magnitude,wanda,sparsegpt

`stories` is the real checkpoint stories260K on TinyStories (the shared data are needed); `llama`
the small Llama that the recipes train, on docstrings that it was trained on too, but not calibrated
on: what is compared is the loss that compression adds. Calibrated on 64 rows of 256 tokens, judged
on 64 others; seeds 0, 1, 2 choose the rows (and the draws of random methods). A step's table is
kept in `--work`, so that a stopped run goes on.
Beside the tables stands how unequal the norms of inputs are, by which Wanda differs from magnitude
(`--spread` measures that alone). Writes `results/compression_quality.json`, plots and a section of
`RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
from compression_runs import (
    HERE,
    interval,
    judged,
    lines_file,
    rows_of,
    run,
    stories,
    stories_model,
)
from sections import write_section
from standalone_svg import standalone

from prunery.pipelines.compression.model_tables import model_source
from prunery.pipelines.compression.quality import compare, load_packed
from prunery.pipelines.compression.statistics import StatisticsTable
from prunery.pipelines.svg import Series, line_chart
from prunery.storage import Store

SEEDS = (0, 1, 2)
SPARSITY = (0.3, 0.5, 0.6, 0.7)
WIDTH = (0.1, 0.2, 0.3, 0.5)
BITS = (8, 4, 3, 2)
# name: plan options, compress options, statistics, what is varied
WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "magnitude": ({"method": "magnitude"}, {}, []),
    "magnitude, global": ({"method": "magnitude", "allocation": "global"}, {}, []),
    "random, ERK": ({"method": "random_weights", "allocation": "erk"}, {}, []),
    "Wanda": ({"method": "wanda"}, {}, []),
    "Wanda, weights updated": ({"method": "wanda"}, {"update": True}, []),
    "Wanda, dense inputs": ({"method": "wanda"}, {"propagate": "dense"}, []),
    "Wanda, CFSP budgets": (
        {"method": "wanda", "allocation": "importance", "importance": "cfsp"},
        {},
        ["angle"],
    ),
    "GBLM": ({"method": "gblm"}, {}, ["gradient_square"]),
    "SparseGPT": ({"method": "sparsegpt"}, {}, []),
    "SparseGPT, Adapt budgets": (
        {"method": "sparsegpt", "allocation": "importance", "importance": "adapt"},
        {},
        ["cosine"],
    ),
}
PATTERNS = {
    f"{name}, {pattern}": ({"method": method, "pattern": pattern}, {}, [])
    for name, method in (("magnitude", "magnitude"), ("Wanda", "wanda"), ("SparseGPT", "sparsegpt"))
    for pattern in ("4:8", "2:4")
}
GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "random groups": ({"method": "random_groups"}, {}, []),
    "magnitude of groups": ({"method": "magnitude_groups"}, {}, []),
    "Wanda-sp": ({"method": "wanda_sp"}, {}, []),
    "FLAP score": ({"method": "flap"}, {}, []),
    "FLAP, bias": ({"method": "flap"}, {"compensate": "bias"}, []),
    "FLAP, refit": ({"method": "flap"}, {"compensate": "refit"}, []),
    "FLAP, one cut, refit": (
        {"method": "flap", "allocation": "global"},
        {"compensate": "refit"},
        ["mean", "m2"],
    ),
    "LLM-Pruner": ({"method": "llm_pruner"}, {}, ["gradient", "gradient_square"]),
    "LLM-Pruner, refit": (
        {"method": "llm_pruner"},
        {"compensate": "refit"},
        ["gradient", "gradient_square"],
    ),
    "random groups, refit": ({"method": "random_groups"}, {"compensate": "refit"}, []),
    "CFSP, neurons only": ({"method": "cfsp", "parts": ["mlp"]}, {}, []),
    "layers by block influence": (
        {"method": "block_influence", "tolerance": 0.1},
        {},
        ["cosine"],
    ),
}
QUANTISED = {
    name: ({"method": "none", "quantiser": quantiser, "group_size": 0}, options, [])
    for name, quantiser, options in (
        ("round to nearest", "rtn", {}),
        ("GPTQ", "gptq", {}),
        ("GPTQ, act order", "gptq", {"act_order": True}),
        ("RSQ", "rsq", {}),
        ("rotated GPTQ", "rsq", {"token_minimum": 1.0}),
    )
}


PLOTTED = {
    "weights": ["magnitude", "Wanda", "Wanda, weights updated", "GBLM", "SparseGPT"],
    "groups": ["random groups", "Wanda-sp", "LLM-Pruner", "FLAP, bias", "FLAP, refit"],
}


def grids() -> list[tuple[str, str, float, tuple[dict[str, Any], dict[str, Any], list[str]]]]:
    """Family, name, level and options of every cell."""
    made = [("weights", n, s, o) for n, o in WEIGHTS.items() for s in SPARSITY]
    made += [("patterns", n, 0.5, o) for n, o in PATTERNS.items()]
    made += [("groups", n, s, o) for n, o in GROUPS.items() for s in WIDTH]
    made += [("bits", n, float(b), o) for n, o in QUANTISED.items() for b in BITS]
    both = {"method": "sparsegpt", "sparsity": 0.5, "bits": 4, "group_size": 0}
    made += [("both", "SparseGPT 50 % and 4 bits in one walk", 0.5, (both, {}, []))]
    return made


class Bench:
    """One model with its rows, in a store."""

    def __init__(self, name: str, work: Path) -> None:
        self.store = Store(work / "store")
        if name == "stories":
            rows = [{"text": text} for text in stories()]
            path = lines_file(work / "stories.jsonl", rows)
            self.model: dict[str, Any] = {"model": str(stories_model(work))}
            self.inputs: dict[str, str] = {}
            tokenizer: dict[str, Any] = {"tokenizer": self.model["model"]}
            chats = run(self.store, "read_chats", "chats", {}, path=str(path), format="text")
        else:
            chats = run(self.store, "read_chats", "chats", {}, path="builtin:python-chats")
            trained = run(self.store, "train_lm", "model", {"chats": chats.key})
            self.model, self.inputs, tokenizer = {}, {"model": trained.key}, {}
        self.tokens = run(
            self.store,
            "tokenize_chats",
            "tokens",
            {"chats": chats.key, **self.inputs},
            max_length=512,
            train_on="all",
            **tokenizer,
        )
        held = self.rows(0, "evaluation")
        self.held = rows_of(self.store, held)
        table = self.store.table(self.inputs["model"]) if self.inputs else None
        self.dense = load_packed(model_source(self.model.get("model"), table))

    def rows(self, seed: int, part: str = "calibration") -> str:
        """Key of 64 windows of 256 tokens."""
        return run(
            self.store,
            "calibration_rows",
            f"{part}_{seed}",
            {"tokens": self.tokens.key},
            seed,
            rows=64,
            length=256,
            part=part,
        ).key

    def cell(
        self, plan: dict[str, Any], apply: dict[str, Any], wanted: list[str], seed: int
    ) -> dict[str, float]:
        """Perplexity and divergence of one compressed model."""
        rows = self.rows(seed)
        more = {}
        if wanted:
            made = run(
                self.store,
                "weight_statistics",
                "statistics",
                {"rows": rows, **self.inputs},
                statistics=wanted,
                **self.model,
            )
            more = {"statistics": made.key}
        planned = run(
            self.store, "plan_compression", "plan", {**more, **self.inputs}, seed,
            **plan, **self.model,
        )  # fmt: skip
        made = run(
            self.store,
            "compress_weights",
            "small",
            {"plan": planned.key, "rows": rows, **more, **self.inputs},
            seed,
            measure=False,
            **apply,
            **self.model,
        )
        found = judged(self.store, self.dense, made.key, self.held)
        return {"perplexity": found.perplexity, "kl": float(found.kl.sum() / found.count.sum())}

    def spread(self) -> float:
        """Standard deviation over mean of the norms of a matrix's inputs; mean of all matrices."""
        made = run(
            self.store,
            "weight_statistics",
            "norms",
            {"rows": self.rows(0), **self.inputs},
            statistics=["sum_squares"],
            **self.model,
        )
        table = StatisticsTable(self.store.table(made.key))
        norms = [
            array.sqrt()
            for layer in table.layers
            for (_, name), array in table.layer(layer).items()
            if name == "sum_squares"
        ]
        return float(np.mean([float(one.std() / one.mean()) for one in norms]))


def main() -> None:
    """Run the grid and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["stories", "llama"], default="stories")
    parser.add_argument("--methods", help="only those whose name holds one of these words")
    parser.add_argument("--spread", action="store_true", help="only the spread of input norms")
    parser.add_argument("--work", type=Path, default=Path("/tmp/prunery-compression"))
    args = parser.parse_args()
    words = args.methods.split(",") if args.methods else [""]
    work = args.work / args.model
    bench = Bench(args.model, work)
    path = HERE / "results" / "compression_quality.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    if args.spread:
        old[args.model]["spread"] = bench.spread()
        write(path, old)
        return
    dense = compare(bench.dense, bench.dense, bench.held, batch_tokens=4096)[0]
    print(f"dense {dense.perplexity:.3f} over {int(dense.count.sum())} tokens", flush=True)
    found = []
    for family, name, level, (plan, apply, wanted) in grids():
        if not any(word.lower() in name.lower() for word in words):
            continue
        key = {"weights": "sparsity", "groups": "sparsity", "bits": "bits"}.get(family)
        given = plan if key is None else {**plan, key: int(level) if key == "bits" else level}
        cells = []
        for seed in SEEDS:
            try:
                cells.append(bench.cell(given, apply, wanted, seed))
            except Exception as error:
                if type(error).__name__ not in ("BudgetError", "InputError", "RecipeError"):
                    raise
                print(f"{name} at {level:g}: {error}", flush=True)
                break
        if len(cells) < len(SEEDS):
            continue
        values = [cell["perplexity"] for cell in cells]
        found.append({"family": family, "name": name, "level": level, "cells": cells})
        print(f"{name:32} {level:4g}  {' '.join(f'{value:9.3f}' for value in values)}", flush=True)
    old[args.model] = {
        "dense": dense.perplexity,
        "tokens": int(dense.count.sum()),
        "spread": bench.spread(),
        "seeds": SEEDS,
        "machine": fresh.machine("cpu", torch.get_num_threads()),
        "cells": found,
    }
    write(path, old)


def write(path: Path, results: dict[str, Any]) -> None:
    """The JSON, the plots and the section."""
    path.write_text(json.dumps(results, indent=1) + "\n")
    for model, result in results.items():
        plot(model, result)
    write_section(HERE / "RESULTS.md", "compression_quality", section(results))


def plot(model: str, result: dict[str, Any]) -> None:
    """Perplexity over dense against the share removed, an SVG."""
    for family in ("weights", "groups"):
        cells = [cell for cell in result["cells"] if cell["family"] == family]
        series = []
        for slot, name in enumerate(PLOTTED[family]):
            points = [
                (cell["level"], math.log2(_mean(cell) / result["dense"]))
                for cell in cells
                if cell["name"] == name
            ]
            series.append(Series(name, points, slot))
        made = line_chart(
            series,
            x_label="share removed",
            y_label="log2(perplexity / dense)",
            label=f"{model}: perplexity against the share of {family} removed",
            x_range=(0.0, 0.75),
            y_range=(0.0, 6.0),
            percent_y=False,
        )
        text = standalone(made, PLOTTED[family])
        (HERE / "results" / f"compression_{model}_{family}.svg").write_text(text + "\n")


def _mean(cell: dict[str, Any]) -> float:
    return interval([one["perplexity"] for one in cell["cells"]])[0]


def section(results: dict[str, Any]) -> str:
    """Tables of every model and family."""
    lines = ["## Compression: perplexity against sparsity and bits", ""]
    lines.append("`python benchmarks/compression_quality.py [--model llama]`; mean of three")
    lines.append(
        "choices of 64 calibration rows of 256 tokens, ± half of the 95 % interval. A cell is"
    )
    lines.append("empty where whole groups or a group of 8 inputs cannot meet it.")
    for model, result in results.items():
        lines += ["", f"### {model}: dense {result['dense']:.3f}", ""]
        lines.append(
            f"{machine_words(result['machine'])}; judged on {result['tokens']} tokens. Norms of a"
            f" matrix's inputs: standard deviation {result['spread']:.2f} of the mean."
        )
        for family in dict.fromkeys(cell["family"] for cell in result["cells"]):
            cells = [cell for cell in result["cells"] if cell["family"] == family]
            levels = list(dict.fromkeys(cell["level"] for cell in cells))
            head = [f"{x:g} bits" if family == "bits" else f"{x:.0%}" for x in levels]
            lines += ["", f"| {family} | {' | '.join(head)} |", "|---|" + "---:|" * len(levels)]
            for name in dict.fromkeys(cell["name"] for cell in cells):
                row = []
                for level in levels:
                    at = [c for c in cells if c["name"] == name and c["level"] == level]
                    row.append(_shown(at[0]) if at else "")
                lines.append(f"| {name} | {' | '.join(row)} |")
        for family in ("weights", "groups"):
            lines += ["", f"![{family}](results/compression_{model}_{family}.svg)"]
    return "\n".join(lines)


def machine_words(machine: dict[str, Any]) -> str:
    """A machine in a few words."""
    return (
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} thread(s), torch"
        f" {machine['versions']['torch']}"
    )


def _shown(cell: dict[str, Any]) -> str:
    mean, half = interval([one["perplexity"] for one in cell["cells"]])
    return f"{mean:.2f} ± {half:.2f}" if mean < 1000 else f"{mean:.0f}"


if __name__ == "__main__":
    main()
