"""What scoring costs beside training: the pass for Q-Tuning's signals against a full epoch.

    python benchmarks/sft_scoring.py

A Llama of a middling size, started at random, is fine-tuned for one epoch on the built-in chats
(AdamW, float32, the loop of `sft_lm.py`: only trained tokens reach the head); then the pass of the
step `token_signals` over the same samples is timed in float32 and bfloat16, and the decisions of
both are compared. Writes `benchmarks/results/sft_scoring.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pyarrow as pa
import torch
from sections import write_section
from sft_lm import Sample, make_model, make_tokenizer, train

from prunery.pipelines.builtin_chats import builtin_chats
from prunery.pipelines.sft_signals import rows_of_signals
from prunery.pipelines.sft_tables import SIGNAL_COLUMNS, TOKEN_SIGNALS, TOKENS
from prunery.pipelines.steps.token_signals import TokenSignalsOptions
from prunery.pipelines.token_scoring import score_samples
from prunery.pruners.models.causal import load_causal
from prunery.pruners.signals.tokens import PromptAttention
from prunery.pruners.token.qtuning import QTuning

HERE = Path(__file__).resolve().parent
BATCH = TokenSignalsOptions().tokens_a_batch
SCHEMA = pa.schema([*TOKEN_SIGNALS, *SIGNAL_COLUMNS["loss"]])


def chats(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompt and answer of some two-message chats."""
    rows = [
        (messages[0]["content"], messages[1]["content"])
        for module in builtin_chats().values()
        for _, messages in module
        if len(messages) == 2
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def tokens_table(samples: list[Sample]) -> pa.Table:
    """The samples as the rows of a `tokenize_chats` table."""
    return pa.Table.from_pylist(
        [
            {
                "id": number,
                "domain": "",
                "input_ids": sample.ids.tolist(),
                "trainable": sample.trained.tolist(),
                "turn": [0] * len(sample.ids),
                "protected": [False] * len(sample.ids),
                "truncated": False,
            }
            for number, sample in enumerate(samples)
        ],
        TOKENS,
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training and scoring, and how far the two precisions agree."""
    where = fresh.machine("cpu", given.threads)
    pairs = chats(given.rows, given.seed)
    tokenizer = make_tokenizer([a + b for a, b in pairs], given.vocabulary)
    samples = []
    for prompt, answer in pairs:
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = np.array([*head, *tail][: given.length], np.int64)
        samples.append(Sample(ids, np.arange(len(ids)) >= len(head)))
    epochs = []
    for _ in range(given.repeats):
        model = make_model(
            given.vocabulary,
            hidden=given.hidden,
            layers=given.layers,
            length=given.length,
            seed=given.seed,
        )
        steps, seconds = train(model, samples, epochs=1, rows=8, rate=5e-4, seed=given.seed)
        epochs.append(seconds)
    table = tokens_table(samples)
    made: dict[str, Any] = {
        "command": fresh.command(__file__),
        "machine": where,
        "seed": given.seed,
        "size": {k: getattr(given, k) for k in ("rows", "hidden", "layers", "vocabulary")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": int(sum(len(s.ids) for s in samples)),
        "targets": int(sum(s.tokens for s in samples)),
        "steps": steps,
        "epoch_seconds": epochs,
        "scoring": {},
    }
    kept, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for dtype in ("float32", "bfloat16"):
            loaded = load_causal(folder, dtype=dtype)
            taken = []
            for _ in range(given.repeats + 1):
                began = time.perf_counter()
                found = score_samples(
                    table,
                    {"model": folder},
                    lambda _, loaded=loaded: loaded,
                    SCHEMA.names,
                    tokens_a_batch=BATCH,
                    attention=PromptAttention(),
                )
                taken.append(time.perf_counter() - began)
            made["scoring"][dtype] = taken[1:]
            rows = rows_of_signals(found.table(SCHEMA))
            method = QTuning(samples=0.5, tokens=0.5, normalise="rank")
            signals = rows.of_tokens(method, np.arange(rows.offset[-1]))
            kept[dtype] = method(signals, seed=0).keep
            losses[dtype] = signals["loss"].astype(np.float64)
    made["same_tokens"] = float((kept["float32"] == kept["bfloat16"]).mean())
    made["correlation"] = float(np.corrcoef(losses["float32"], losses["bfloat16"])[0, 1])
    return made


def section(made: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    where, epochs = made["machine"], made["epoch_seconds"]
    epoch = statistics.median(epochs)
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "## Scoring beside training",
        "",
        f"`{made['command']}`",
        "",
        f"{where['processor']}, {where['threads']} threads, Python {where['python']}, {versions}."
        f" Seed {made['seed']}; {made['size']}, {made['parameters'] / 1e6:.1f} M parameters;"
        f" {made['tokens']:,} tokens, {made['targets']:,} of them trained. One epoch of full"
        f" fine-tuning in float32: {made['steps']} steps, {epoch:.1f} s (median;"
        f" {min(epochs):.1f} to {max(epochs):.1f}).",
        "",
        "| scoring in | seconds (median) | low to high | share of the epoch |",
        "|---|---:|---:|---:|",
    ]
    for dtype, taken in made["scoring"].items():
        middle = statistics.median(taken)
        lines.append(
            f"| {dtype} | {middle:.2f} | {min(taken):.2f} to {max(taken):.2f}"
            f" | {middle / epoch:.0%} |"
        )
    lines += [
        "",
        f"Q-Tuning decides {made['same_tokens']:.2%} of the tokens alike in both precisions; the"
        f" losses correlate at {made['correlation']:.5f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = measure(given)
    fresh.save(given.results, "sft_scoring", made)
    text = section(made)
    write_section(given.results / "RESULTS.md", "sft-scoring", text)
    print(text)


if __name__ == "__main__":
    main()
