"""Seconds and memory of compression against llm-compressor and torch-pruning, one model, one run.

    python benchmarks/compression_speed.py --peer PYTHON

PYTHON is the interpreter of an environment with `pip install llmcompressor torch-pruning`, as its
pins of transformers and ours differ. Both get the same folder, the same rows of token ids and the
same number of threads, each in a process of its own; timed is the call that compresses a model
(ours reads and writes every layer on the way, llm-compressor holds the whole model). Every method
prunes half of the weights or rounds to 4 bits, a scale a row; torch-pruning removes half of the
groups by magnitude (as ours then does, heads and neurons) and is timed alone. Models: stories260K,
on which results are judged (the shared data are needed), and a Llama of random weights, 4 layers of
1,024, where matrices are large enough for arithmetic to count. Writes
`results/compression_speed.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import torch
from compression_peers import peak_bytes
from compression_runs import HERE, interval, run, stories, stories_model
from sections import write_section

from prunery.pipelines.compression.quality import Rows, compare, load_packed
from prunery.storage import Store

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "gptq": {"method": "none", "bits": 4, "group_size": 0, "quantiser": "gptq"},
    "torch_pruning": {"method": "magnitude_groups", "sparsity": 0.5},
}
"""Ours, by the name that the peers' script has for theirs; the last is of groups by magnitude."""
LIMIT = 300
"""Seconds that one call may take."""
WHO = ("ours", "ours, bfloat16 passes", "llm-compressor")
HIDDEN, WIDTH, LAYERS = 1024, 2816, 4


def random_llama(work: Path) -> Path:
    """Folder of a Llama of random weights; its outputs mean nothing, its sizes do."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = work / "random_llama"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(stories_model(work)).save_pretrained(folder)
    return folder


def token_rows(work: Path, rows: int, length: int, skip: int) -> np.ndarray:
    """Windows of TinyStories, (rows, length)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_model(work))
    ids: list[int] = []
    for text in stories()[skip:]:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= rows * length:
            break
    return np.array(ids[: rows * length], np.int64).reshape(rows, length)


def ours(method: str, model: str, rows: str, out: str, *, autocast: bool) -> None:
    """One method of ours in this process; prints what the peers' script prints."""
    # What is imported on the way is imported before the clock starts, here as with the peers.
    import pyarrow as pa
    import transformers.models.llama.modeling_llama  # noqa: F401

    import prunery.pipelines.compression.apply
    import prunery.pipelines.compression.compressors
    import prunery.pipelines.compression.plan  # noqa: F401
    from prunery.pipelines.compression.model_tables import model_folder
    from prunery.pipelines.compression.tables import CALIBRATION

    store = Store(Path(out) / "store")
    table = [
        {"id": i, "domain": "", "input_ids": row, "labels": row, "sources": [i], "score": None}
        for i, row in enumerate(np.load(rows).tolist())
    ]
    with store.write(name="rows", step="calibration_rows", schema=CALIBRATION) as writer:
        for number in writer.pending(1):
            with writer.shard(number) as shard:
                shard.write(pa.Table.from_pylist(table, CALIBRATION))
        key = writer.commit().key
    before = peak_bytes(reset=True)
    start, used = time.perf_counter(), time.process_time()
    planned = run(store, "plan_compression", "plan", {}, model=model, **METHODS[method])
    made = run(
        store,
        "compress_weights",
        "small",
        {"plan": planned.key, "rows": key},
        model=model,
        measure=False,
        autocast=autocast,
    )
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = peak_bytes()
    folder = model_folder(store.table(made.key))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": used,
                "peak_bytes": peak,
                "before_bytes": before,
                "folder": str(folder),
            }
        )
    )


def called(command: list[str], threads: int, work: Path) -> dict[str, Any]:
    """The last line of JSON that a process prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PRUNERY_CACHE": str(work / "cache"),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {LIMIT} seconds"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def perplexity(dense: Any, folder: Path, rows: np.ndarray) -> float:
    """Of the weights in a folder that holds all but the output layer (tied)."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    other = load_packed(dense.name_or_path)
    other.load_state_dict(state, strict=False)
    return judged(dense, other, rows)


def judged(dense: Any, other: Any, rows: np.ndarray) -> float:
    """Perplexity on rows of ids."""
    tokens = list(rows)
    targets = [np.ones(len(row), np.bool_) for row in tokens]
    given = Rows(np.arange(len(tokens)), tokens, targets)
    return compare(dense, other, given, batch_tokens=4096)[1].perplexity


def main() -> None:
    """Run both and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="stories,random")
    parser.add_argument("--work", type=Path, default=Path("/tmp/prunery-speed"))
    parser.add_argument("--ours", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--autocast", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        torch.set_num_threads(args.threads)
        ours(*args.ours, autocast=args.autocast)
        return
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "rows.npy", token_rows(work, args.rows, args.length, 0))
    held = token_rows(work, 32, 256, 1200)
    machine = fresh.machine("cpu", args.threads)
    cells = []
    for name in args.models.split(","):
        model = stories_model(work) if name == "stories" else random_llama(work)
        dense = load_packed(model)
        for method in METHODS:
            if method == "torch_pruning" and name != "stories":
                continue
            cell: dict[str, Any] = {"model": name, "method": method}
            for who in WHO:
                found = []
                for repeat in range(args.repeats):
                    out = work / f"{name}-{method}-{who}-{repeat}-{time.time_ns()}"
                    if who != "llm-compressor":
                        command = [sys.executable, __file__, "--threads", str(args.threads)]
                        command += ["--ours", method, str(model), str(work / "rows.npy"), str(out)]
                        command += ["--autocast"] if who != "ours" else []
                    elif args.peer:
                        command = [args.peer, str(HERE / "compression_peers.py"), method]
                        command += [str(model), str(work / "rows.npy"), str(out)]
                        command += ["--threads", str(args.threads)]
                    else:
                        continue
                    made = called(command, args.threads, work)
                    judgeable = method != "torch_pruning" or who != "llm-compressor"
                    if name == "stories" and judgeable and "error" not in made and repeat == 0:
                        if who != "llm-compressor":
                            made["perplexity"] = judged(dense, load_packed(made["folder"]), held)
                        else:
                            made["perplexity"] = perplexity(dense, out, held)
                    made.pop("folder", None)  # of this machine
                    found.append(made)
                    if "error" in made:
                        break  # what fails or takes too long once does so again
                cell[who] = found
                print(name, method, who, [one.get("seconds", one) for one in found], flush=True)
            cells.append(cell)
    result = {
        "command": f"python benchmarks/compression_speed.py --peer PYTHON --rows {args.rows}",
        "rows": args.rows,
        "length": args.length,
        "machine": machine,
        "cells": cells,
    }
    path = HERE / "results" / "compression_speed.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_section(HERE / "RESULTS.md", "compression_speed", section(result))


def section(result: dict[str, Any]) -> str:
    """Seconds, memory and perplexity side by side."""
    machine = result["machine"]
    lines = ["## Compressing a model: seconds and memory", "", f"`{result['command']}`", ""]
    versions: dict[str, str] = {}
    for cell in result["cells"]:
        for one in cell.get("llm-compressor", []):
            versions |= one.get("versions", {})
    lines.append(
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load_before']:.1f};"
        f" {result['rows']} rows of {result['length']} tokens. Peers: {versions}. Median of the"
        " repeats and their range; memory is the peak of the process."
    )
    lines += [
        "",
        "| model | method | ours, s | peer, s | times as fast | ours, MB | theirs, MB"
        " | perplexity ours | theirs |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        theirs = _times(cell.get("llm-compressor", []))
        for who in WHO[:-1]:
            mine = _times(cell.get(who, []))
            faster = f"{theirs[0] / mine[0]:.1f}" if mine and theirs else ""
            row = [cell["model"], cell["method"] + who.removeprefix("ours")]
            row += [_spread(cell.get(one, [])) for one in (who, WHO[-1])]
            row.append(faster)
            row += [_memory(cell.get(one, [])) for one in (who, WHO[-1])]
            row += [_perplexity(cell.get(one, [])) for one in (who, WHO[-1])]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _times(found: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    values = [one["seconds"] for one in found if "seconds" in one]
    return (float(np.median(values)), min(values), max(values)) if values else None


def _spread(found: list[dict[str, Any]]) -> str:
    taken = _times(found)
    if taken is None:
        return next((one["error"] for one in found if "error" in one), "not run")
    return f"{taken[0]:.1f} ({taken[1]:.1f} to {taken[2]:.1f})"


def _memory(found: list[dict[str, Any]]) -> str:
    values = [one["peak_bytes"] / 1e6 for one in found if "peak_bytes" in one]
    return f"{interval(values)[0]:.0f}" if values else ""


def _perplexity(found: list[dict[str, Any]]) -> str:
    values = [one["perplexity"] for one in found if "perplexity" in one]
    return f"{values[0]:.2f}" if values else ""


if __name__ == "__main__":
    main()
