"""Parts of prompt search by themselves: the searches on made landscapes, clusters, the log.

    python benchmarks/prompt_parts.py

A landscape: each of `--words` words moves the log odds of 64 rows by a gain of its own, and two
words beside each other by one of the pair, so that neither greedy nor single words see all of it.
The reward is the mean log likelihood. What is reported is the share of the way from the empty
prompt to the best prompt that any search of the same landscape found, at equal prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
from sections import write_section

from prunery.pipelines.models import encoder
from prunery.pipelines.prompts.answer_log import SqliteLog
from prunery.pipelines.prompts.clusters import cluster_words
from prunery.pipelines.prompts.search import rounds, start
from prunery.pipelines.prompts.vocabulary import WordFilter, tokenizer_entries, vocabulary_rows
from prunery.pipelines.student_figures import figure
from prunery.pruners.models.token_rows import token_vectors, tokenizer_home
from prunery.pruners.models.tokenizers import load_tokenizer

HERE = Path(__file__).resolve().parent
SEARCHES: list[tuple[str, str, dict[str, Any]]] = [
    ("greedy", "greedy", {}),
    ("genetic", "genetic", {}),
    ("genetic, population 64", "genetic", {"population": 64, "mutants": 32, "crossovers": 32}),
    ("genetic, as published", "genetic", {"published": True}),
    ("particle swarm", "particle_swarm", {}),
    ("random", "random", {}),
]
LENGTH = 5


class Landscape:
    """Rewards of prompts, from a seed."""

    def __init__(self, words: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rows = rng.normal(0, 1, 64)
        self.gain = rng.normal(0, 0.2, words) + 0.6 * (rng.random(words) < 0.1)
        self.pair = rng.normal(0, 0.2, (words, words))

    def reward(self, prompts: list[tuple[int, ...]]) -> list[float]:
        """Mean log likelihood (P,) of the rows."""
        made = []
        for prompt in prompts:
            shift = sum(self.gain[word] for word in prompt)
            shift += sum(self.pair[a, b] for a, b in pairwise(prompt))
            made.append(float(-np.logaddexp(0, -(self.rows + shift)).mean()))
        return made


def searches(given: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Share of the way to the best known, by search and number of prompts, one value a seed."""
    made: dict[str, dict[int, list[float]]] = {}
    for seed in range(given.seeds):
        land = Landscape(given.words, seed)
        best: dict[str, dict[int, float]] = {}
        for name, method, options in SEARCHES:
            for prompts in given.prompts:
                found = start(
                    method, options, vocabulary=given.words, length=LENGTH, prompts=prompts,
                    seed=seed,
                )  # fmt: skip
                highest = max(float(one.rewards.max()) for one in rounds(found, land.reward))
                best.setdefault(name, {})[prompts] = highest
        top = max(value for line in best.values() for value in line.values())
        empty = land.reward([()])[0]
        for name, line in best.items():
            for prompts, value in line.items():
                share = (value - empty) / (top - empty)
                made.setdefault(name, {}).setdefault(prompts, []).append(share)
    return made


def clusters(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Full and mini-batch k-means of the packaged encoder's words, one thread."""
    folder = encoder("all-MiniLM-L6-v2").path
    tokenizer = load_tokenizer(tokenizer_home(str(folder)))
    entries = tokenizer_entries(tokenizer, word_start=True)
    wanted = WordFilter(letters_only=True, least_characters=2)
    rows = [row for row in vocabulary_rows(entries, wanted) if row["keep"]]
    ids = np.array([row["id"] for row in rows], np.int64)
    vectors = token_vectors(folder, [row["text"] for row in rows])
    made = []
    for algorithm in ("kmeans", "minibatch"):
        began = time.process_time()
        found = cluster_words(ids, vectors, given.clusters, algorithm=algorithm, seed=0)
        seconds = time.process_time() - began
        inertia = float((found.distance.astype(np.float64) ** 2).sum())
        made.append({"algorithm": algorithm, "seconds": seconds, "inertia": inertia,
                     "words": len(ids), "clusters": int(found.keep.sum())})  # fmt: skip
    return made


def durable_writes(given: argparse.Namespace) -> list[float]:
    """Milliseconds of each of many single answers written down."""
    took = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        log = SqliteLog(Path(folder) / "answers.sqlite")
        for number in range(given.writes):
            began = time.perf_counter()
            log.keep([("prompt", str(number))], [(np.zeros(4, np.float32), 30, 1)])
            took.append(1e3 * (time.perf_counter() - began))
        log.close()
    return took


def section(made: dict[str, Any]) -> str:
    """The part of RESULTS.md."""
    where = made["machine"]
    counts = made["options"]["prompts"]
    lines = [
        "## Parts of prompt search",
        "",
        f"`{made['command']}` ({where['processor']}, 1 thread, Python {where['python']}, load"
        f" average before {where['load_before']:.1f}).",
        "",
        f"Searches on {made['options']['seeds']} made landscapes, {made['options']['words']} words,"
        f" prompts of {LENGTH}: share of the way from the empty prompt to the best that was found,"
        " mean and 95 % t-interval over landscapes.",
        "",
        "| search | " + " | ".join(f"{count:,} prompts" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for name, line in made["searches"].items():
        lines.append(f"| {name} | " + " | ".join(str(figure(line[str(n)])) for n in counts) + " |")
    lines += ["", "| k-means | words | clusters | seconds | sum of squared distances |",
              "|---|---|---|---|---|"]  # fmt: skip
    for one in made["clusters"]:
        lines.append(
            f"| {one['algorithm']} | {one['words']:,} | {one['clusters']:,} | {one['seconds']:.0f}"
            f" | {one['inertia']:,.0f} |"
        )
    low, middle, high = np.percentile(made["writes"], [10, 50, 90])
    lines += ["", f"One answer written durably: {middle:.1f} ms (10th to 90th percentile {low:.1f}"
              f" to {high:.1f}), {len(made['writes'])} writes."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 1000, 4000])
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--writes", type=int, default=200)
    parser.add_argument("--folder", default=".", help="on the disk whose writes are timed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = fresh.machine("cpu", 1, ("torch", "scikit-learn", "numpy"))
    made = {
        "command": fresh.command(__file__),
        "machine": where,
        "options": vars(given),
        "searches": searches(given),
        "clusters": clusters(given),
        "writes": durable_writes(given),
    }
    text = json.dumps(made, indent=1)
    (HERE / "results" / "prompt_parts.json").write_text(text + "\n", encoding="utf-8")
    write_section(HERE / "RESULTS.md", "prompt-parts", section(json.loads(text)))
    print(section(json.loads(text)))


if __name__ == "__main__":
    main()
