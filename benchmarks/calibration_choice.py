"""What the choice of calibration rows is worth: the same method, the same number of tokens.

    python benchmarks/calibration_choice.py

The pool is a mixture as a user has it: TinyStories, WikiText-2, Shakespeare and code, half of all
samples said twice with a word changed, one domain of four being the one that the model is for. The
checkpoint stories260K is compressed with calibration rows that are chosen at random from the
pool, or after a stage of this project pruned it: near-duplicates removed, Q-Tuning's samples,
ssToken's tokens (statistics over those alone, of as many tokens), rows of the model's own domain,
and the last with near-duplicates removed. Every choice has the same number of tokens that
statistics look at, and is judged on TinyStories that no choice may use. Seeds move the rows
chosen. Differences to random rows are paired by seed.

Needs the shared data. Writes `results/calibration_choice.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import fresh
import torch
from compression_runs import (
    HERE,
    SHARED,
    interval,
    judged,
    lines_file,
    rows_of,
    run,
    stories,
    stories_model,
)
from sections import write_section

from prunery.pipelines.compression.quality import compare, load_packed
from prunery.storage import Store

WORDS = 120  # of a sample
EACH = 300  # samples of a domain
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Wanda 50 %": ({"method": "wanda", "sparsity": 0.5}, {}),
    "SparseGPT 50 %": ({"method": "sparsegpt", "sparsity": 0.5}, {}),
    "SparseGPT 2:4": ({"method": "sparsegpt", "pattern": "2:4"}, {}),
    "GPTQ 3 bits": ({"method": "none", "bits": 3, "group_size": 0, "quantiser": "gptq"}, {}),
    "FLAP 20 %, refit": ({"method": "flap", "sparsity": 0.2}, {"compensate": "refit"}),
}


def pieces(text: str, count: int) -> list[str]:
    """The first samples of WORDS words of a text."""
    words = text.split()
    return [" ".join(words[at : at + WORDS]) for at in range(0, count * WORDS, WORDS)]


def read(folder: str) -> str:
    """All text of a folder's first compressed text file."""
    with gzip.open(next((SHARED / folder).glob("*.txt.gz")), "rt", encoding="utf-8") as file:
        return file.read()


def pool() -> list[dict[str, str]]:
    """Samples of four domains; every second one stands a second time with a word changed."""
    with gzip.open(SHARED / "sft_codealpaca" / "code_alpaca_2k.json.gz", "rt") as file:
        code = " ".join(row["output"] for row in json.load(file))
    tales = stories()
    texts = {
        "stories": pieces(" ".join(tales[: len(tales) // 2]), EACH),
        "wikitext": pieces(read("lm_wikitext2"), EACH),
        "shakespeare": pieces(read("lm_tinyshakespeare"), EACH),
        "code": pieces(code, EACH),
    }
    draw = random.Random(0)
    rows = []
    for domain, found in texts.items():
        for number, text in enumerate(found):
            rows.append({"text": text, "domain": domain})
            if number % 2 == 0:
                words = text.split()
                words[draw.randrange(len(words))] = "thing"
                rows.append({"text": " ".join(words), "domain": domain})
    return rows


class Bench:
    """The pool, its decisions and the rows that are judged on."""

    def __init__(self, work: Path, tokens: int, length: int) -> None:
        self.store, self.tokens, self.length = Store(work / "store"), tokens, length
        self.model = str(stories_model(work))
        self.pool = self.tokenised(lines_file(work / "pool.jsonl", pool()), "pool")
        tales = stories()
        held = [{"text": text, "domain": "held"} for text in tales[len(tales) // 2 :]]
        found = self.tokenised(lines_file(work / "held.jsonl", held), "held")
        key = run(
            self.store, "calibration_rows", "judged", {"tokens": found}, rows=96, length=256
        ).key
        self.held = rows_of(self.store, key)
        self.dense = load_packed(self.model)
        self.decide()

    def tokenised(self, path: Path, name: str) -> str:
        """Key of the tokens of a file's rows."""
        chats = run(
            self.store, "read_chats", f"{name}_chats", {}, path=str(path), format="text",
            domain_field="domain",
        )  # fmt: skip
        if name == "pool":
            self.chats = chats.key
        return run(
            self.store, "tokenize_chats", name, {"chats": chats.key},
            tokenizer=self.model, max_length=512, train_on="all",
        ).key  # fmt: skip

    def decide(self) -> None:
        """Near-duplicates, Q-Tuning and ssToken over the pool, each once."""
        store = self.store
        vectors = run(store, "embed", "vectors", {"chunks": self.chats})
        self.distinct = run(
            store, "prune_sft", "distinct", {"tokens": self.pool, "embeddings": vectors.key},
            method="near_duplicate", options={"distance": 0.1},
        ).key  # fmt: skip
        signals = run(
            store, "token_signals", "signals", {"tokens": self.pool}, model=self.model,
            signals=["loss", "history", "attention"], history=self.model,
        )  # fmt: skip
        inputs = {"tokens": self.pool, "signals": signals.key}
        self.qtuning = run(
            store, "prune_sft", "qtuning", inputs, method="qtuning",
            options={"normalise": "rank", "samples": 0.5, "tokens": 1.0},
        ).key  # fmt: skip
        # No earlier self is at hand: attention alone chooses.
        self.sstoken = run(
            store, "prune_sft", "sstoken", inputs, method="sstoken",
            options={"gamma": 0.0, "tokens": 0.5},
        ).key  # fmt: skip

    def choices(self) -> dict[str, dict[str, Any]]:
        """Name of a choice to its decision and options."""
        return {
            "random rows": {},
            "near-duplicates removed": {"decision": self.distinct},
            "Q-Tuning samples": {"decision": self.qtuning},
            "ssToken tokens": {"decision": self.sstoken, "tokens": "trained"},
            "random half of tokens": {"tokens": "half"},
            "own domain": {"domains": ["stories"]},
            "own domain, no near-duplicates": {"decision": self.distinct, "domains": ["stories"]},
        }

    def rows(self, choice: dict[str, Any], seed: int) -> str:
        """Key of a choice's rows; twice as many where half of the tokens count."""
        decision = choice.get("decision")
        count = self.tokens // self.length * (2 if "tokens" in choice else 1)
        if choice.get("tokens") == "half":
            decision = run(
                self.store, "prune_sft", f"half_{seed}", {"tokens": self.pool}, seed,
                method="random_tokens", options={"tokens": 0.5},
            ).key  # fmt: skip
        return run(
            self.store,
            "calibration_rows",
            "rows",
            {"tokens": self.pool, **({"decision": decision} if decision else {})},
            seed,
            rows=count,
            length=self.length,
            domains=choice.get("domains"),
        ).key

    def perplexity(self, plan: str, choice: dict[str, Any], seed: int) -> float:
        """Of the model compressed on one choice of rows, on the held-out stories."""
        options, apply = PLANS[plan]
        planned = run(self.store, "plan_compression", "plan", {}, model=self.model, **options)
        made = run(
            self.store,
            "compress_weights",
            "small",
            {"plan": planned.key, "rows": self.rows(choice, seed)},
            model=self.model,
            measure=False,
            tokens="trained" if "tokens" in choice else "all",
            **apply,
        )
        return judged(self.store, self.dense, made.key, self.held).perplexity


def main() -> None:
    """Run all choices and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("/tmp/prunery-calibration"))
    args = parser.parse_args()
    bench = Bench(args.work, args.tokens, args.length)
    dense = compare(bench.dense, bench.dense, bench.held, batch_tokens=4096)[0].perplexity
    found: dict[str, dict[str, list[float]]] = {}
    for plan in PLANS:
        found[plan] = {}
        for name, choice in bench.choices().items():
            values = [bench.perplexity(plan, choice, seed) for seed in range(args.seeds)]
            found[plan][name] = values
            print(f"{plan:18} {name:32} {' '.join(f'{v:8.3f}' for v in values)}", flush=True)
    result = {
        "command": f"python benchmarks/calibration_choice.py --seeds {args.seeds}",
        "dense": dense,
        "tokens": args.tokens,
        "seeds": args.seeds,
        "machine": fresh.machine("cpu", torch.get_num_threads()),
        "perplexity": found,
    }
    path = HERE / "results" / "calibration_choice.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_section(HERE / "RESULTS.md", "calibration_choice", section(result))


def section(result: dict[str, Any]) -> str:
    """Perplexities, and paired differences to random rows."""
    lines = ["## What the choice of calibration rows is worth", "", f"`{result['command']}`", ""]
    lines.append(
        f"{result['machine']['processor']}, {result['machine']['threads']} thread(s), torch"
        f" {result['machine']['versions']['torch']}. stories260K, dense"
        f" perplexity {result['dense']:.3f} on held-out TinyStories; "
        f"{result['tokens']} tokens that statistics look at in every cell, {result['seeds']} seeds;"
        " mean, and the paired difference to random rows of the pool with its 95 % interval in"
        " parentheses (negative is better)."
    )
    plans = list(result["perplexity"])
    lines += ["", f"| rows | {' | '.join(plans)} |", "|---|" + "---:|" * len(plans)]
    for name in result["perplexity"][plans[0]]:
        cells = []
        for plan in plans:
            values = result["perplexity"][plan]
            mean, _ = interval(values[name])
            if name == "random rows":
                cells.append(f"{mean:.3f}")
                continue
            pairs = zip(values[name], values["random rows"], strict=True)
            difference, half = interval([one - other for one, other in pairs])
            cells.append(f"{mean:.3f} ({difference:+.3f} ± {half:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
