"""What selection inside training costs and gains: speed, memory, held-out loss.

    python benchmarks/sft_online.py --data ../shared/data

A small Llama learns rows of GSM8K as plain text, then each setting fine-tunes it on the answers
of other rows with the same trainer, loss, number of optimiser steps, learning rate and windows
(8 rows a micro-batch, 4 micro-batches a step): everything, dynamic Q-Tuning and a random choice
of samples and tokens at three budgets each, ssToken and random tokens. Each setting has a process
of its own, which runs all seeds; its memory is the peak of the first seed's training above what
was resident before it (Linux). Held-out loss is the mean over the trained tokens of rows that no
run saw. Writes `results/sft_online.json` and a section of `RESULTS.md` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from fresh import forget_peak, resident
from sections import write_section
from sft_lm import EOS, Sample, held_out, make_model, make_tokenizer, train
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from prunery import METHODS, OnlineSelection, PruningTrainer
from prunery.pruners import rules
from prunery.pruners.contract import Budget, Selection, Signals

HERE = Path(__file__).resolve().parent
ROWS = "sft_gsm8k/train.jsonl.gz"
BUDGETS = ((0.125, 0.5), (0.25, 0.5), (0.5, 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomBoth:
    """The control of a joint method: a random share of the samples, and of their tokens."""

    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("samples", "fraction_of_groups")
    scope: ClassVar[str] = "table"
    group: ClassVar[str] = "sample"
    samples: float
    tokens: float

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for T tokens."""
        ids, sample = signals["id"], signals["sample"]
        whole = np.unique(sample)
        stay, _ = rules.top_fraction(rules.uniform(seed, whole), whole, self.samples)
        score = rules.uniform(seed, ids)
        keep = rules.top_fraction_by_group(score, ids, sample, self.tokens)
        keep &= stay[np.searchsorted(whole, sample)]
        reason = (~keep).astype(np.uint8)
        return Selection(keep, score.astype(np.float32), reason, ("drawn", "not_drawn"))


def settings() -> dict[str, OnlineSelection | None]:
    """Name of each row of the table and what it selects."""
    found: dict[str, OnlineSelection | None] = {"full": None}
    for samples, tokens in BUDGETS:
        share = f"{100 * samples:g}x{100 * tokens:g}"
        joint = {"samples": samples, "tokens": tokens}
        found[f"qtuning {share}"] = OnlineSelection(method=METHODS["qtuning"](**joint))
        found[f"random {share}"] = OnlineSelection(method=RandomBoth(**joint))
    found["sstoken 60"] = OnlineSelection(method=METHODS["sstoken"](tokens=0.6))
    found["random tokens 60"] = OnlineSelection(method=METHODS["random_tokens"](tokens=0.6))
    return found


def prepare(given: argparse.Namespace, work: Path) -> None:
    """The base model and the token ids of all rows, in `work`."""
    path = given.data / ROWS
    if not path.is_file():
        sys.exit(f"{path} is not there. Give the folder of sft_gsm8k with --data.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    order = np.random.default_rng(11).permutation(len(rows))
    rows = [rows[i] for i in order[: given.seen + given.pool + given.held]]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    answers = [f" {row['answer']}" for row in rows]
    seen = slice(0, given.seen)
    tokenizer = make_tokenizer(
        [p + a for p, a in zip(prompts[seen], answers[seen], strict=True)], given.vocabulary
    )
    end = tokenizer.convert_tokens_to_ids(EOS)
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        made.append((head, [*tail, end]))
    made = [row for row in made if len(row[0]) + len(row[1]) <= given.length]
    base = [sample_of([end], head + tail) for head, tail in made[seen]]
    shape = {"hidden": given.hidden, "layers": given.layers, "length": given.length + 1}
    model = make_model(len(tokenizer), **shape, seed=0)
    train(model, base, epochs=given.base_epochs, rows=16, rate=2e-3, seed=0)
    model.save_pretrained(work / "base")
    rest = made[given.seen :]
    held = rest[: given.held]
    pool = rest[given.held : given.held + given.pool]
    (work / "rows.json").write_text(json.dumps({"held": held, "pool": pool}))


def sample_of(head: list[int], tail: list[int]) -> Sample:
    """A row whose `tail` is trained."""
    ids = np.array([*head, *tail], np.int64)
    return Sample(ids, np.arange(len(ids)) >= len(head))


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest."""
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }


class Counting(PruningTrainer):
    """Counts the tokens that are trained and that the network reads with a graph."""

    trained = 0
    read = 0

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        """One micro-batch."""
        self.trained += int((inputs["labels"] != -100).sum())
        self.read += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *rest)


def run(name: str, given: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """All seeds of one setting, in this process."""
    found = json.loads((work / "rows.json").read_text())
    held = [sample_of(head, tail) for head, tail in found["held"]]
    pool = [
        {
            "id": number,
            "input_ids": head + tail,
            "labels": [-100] * len(head) + tail,
            "attention_mask": [1] * (len(head) + len(tail)),
        }
        for number, (head, tail) in enumerate(found["pool"])
    ]
    return [one_seed(name, seed, pool, held, given, work) for seed in range(given.seeds)]


def one_seed(
    name: str,
    seed: int,
    pool: list[dict[str, Any]],
    held: list[Sample],
    given: argparse.Namespace,
    work: Path,
) -> dict[str, float]:
    """Train once and measure."""
    arguments = TrainingArguments(
        output_dir=str(work / "out"),
        num_train_epochs=given.epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    model = LlamaForCausalLM.from_pretrained(work / "base")
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=pool,
        data_collator=collate,
        selection=settings()[name],
    )
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    seconds = time.perf_counter() - began
    after = resident("VmHWM")
    logs = trainer.state.log_history
    chosen = {
        key: sum(one.get(f"selection/{key}", 0.0) for one in logs)
        for key in ("seconds", "correlation", "topped_up")
    }
    model.eval()
    losses = held_out(model, held)
    return {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "selecting": chosen["seconds"],
        "correlation": chosen["correlation"] / trainer.state.global_step,
        "topped_up": chosen["topped_up"] / trainer.state.global_step,
        "trained_tokens": trainer.trained,
        "read_tokens": trainer.read,
        "peak_mb": (after - before) / 2**20,
        "held_out": float(losses[:, 0].sum() / losses[:, 1].sum()),
    }


def measure(name: str, given: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """One setting in a fresh process."""
    out = work / "result.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--work", str(work)]
    subprocess.run(command, check=True)
    found: list[dict[str, float]] = json.loads(out.read_text())
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The Markdown table."""
    lines = [
        "| setting | tokens trained | steps a second | x full | selecting | of full's time |"
        " memory over start, MB | held-out loss, nats | topped up | corr. loss, entropy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    full = mean(results["full"], "seconds") / mean(results["full"], "steps")
    for name, runs in results.items():
        pace = mean(runs, "seconds") / mean(runs, "steps")
        held = [run["held_out"] for run in runs]
        spread = statistics.stdev(held) if len(held) > 1 else 0.0
        plane = name.startswith("qtuning")
        lines.append(
            f"| {name} | {mean(runs, 'trained_tokens'):,.0f} | {1 / pace:.2f} | {full / pace:.2f} |"
            f" {100 * mean(runs, 'selecting') / mean(runs, 'seconds'):.0f} % |"
            f" {100 * mean(runs, 'selecting') / mean(results['full'], 'seconds'):.0f} % |"
            f" {runs[0]['peak_mb']:.0f} | {statistics.mean(held):.3f} ± {spread:.3f} |"
            + (
                f" {100 * mean(runs, 'topped_up'):.0f} % | {mean(runs, 'correlation'):.2f} |"
                if plane
                else " | |"
            )
        )
    return "\n".join(lines)


def mean(runs: Sequence[dict[str, float]], name: str) -> float:
    """Mean over the seeds."""
    return statistics.mean(run[name] for run in runs)


def commit() -> str:
    """The commit that is checked out, or "unknown" outside a repository."""
    asked = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parsed() -> argparse.Namespace:
    """Sizes and places."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seen", type=int, default=2000, help="rows that the base model learns")
    parser.add_argument("--pool", type=int, default=416, help="rows of fine-tuning")
    parser.add_argument("--held", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--base-epochs", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=288)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--settings", nargs="*", default=None, help="fewer rows of the table")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prepare, measure each setting, write."""
    given = parsed()
    disable_progress_bar()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.worker is not None:
        (given.work / "result.json").write_text(json.dumps(run(given.worker, given, given.work)))
        return
    began = time.perf_counter()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(given, Path(folder))
        print(f"base model: {time.perf_counter() - began:.0f} s", flush=True)
        chosen = [name for name in settings() if name in (given.settings or settings())]
        for name in dict.fromkeys(["full", *chosen]):
            results[name] = measure(name, given, Path(folder))
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    command = shlex.join(["python", "benchmarks/sft_online.py", *sys.argv[1:]])
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": libraries,
    }
    sizes = {
        key: value if isinstance(value, int | float) else str(value)
        for key, value in vars(given).items()
        if key not in ("worker", "work", "results", "settings")
    }
    text = "\n\n".join(
        [
            "## Selection inside training",
            f"Command: `{command}` at commit {commit()}, {machine['cores']} cores,"
            f" {machine['threads']} threads, torch {libraries['torch']}, transformers"
            f" {libraries['transformers']}; GSM8K, {given.pool} rows, {given.epochs} epoch, a Llama"
            f" of {given.layers} layers of {given.hidden}, {given.seeds} seeds (mean and standard"
            " deviation over seeds of the order of rows and of random choices; the base model is"
            " one). `qtuning 25x50` = 25 % of samples, 50 % of the tokens of quadrant 2."
            " `selecting` = share of its training time that scoring and deciding take, and the same"
            " seconds as a share of the time of full training. Memory: the first seed, in a process"
            " of its own.",
            table(results),
        ]
    )
    print(text)
    folder_of_results = given.results / "results"
    folder_of_results.mkdir(parents=True, exist_ok=True)
    found = {
        "command": command,
        "commit": commit(),
        "machine": machine,
        "sizes": sizes,
        "settings": results,
        "seconds": time.perf_counter() - began,
    }
    (folder_of_results / "sft_online.json").write_text(
        json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    write_section(given.results / "RESULTS.md", "sft-online", text)


if __name__ == "__main__":
    main()
