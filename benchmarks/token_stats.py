"""Time and memory of `kernels.token_stats` against full logits and other implementations.

    python benchmarks/token_stats.py
    python benchmarks/token_stats.py --device cuda

Random hidden states, weights and targets; every row has a target. Cases:

- `full`: float32 logits of all rows, log_softmax, loss, entropy and log-sum-exp from it.
- `chunked`: the same over 512 rows at a time, as one would write it.
- `torch`, `triton`: ours. `torch rank`, `triton rank`: with the target's rank.
- `liger`: liger-kernel's loss and entropy; `cce`: cut-cross-entropy's loss, no entropy. Both
  need a GPU and are measured where they are installed.
- `product`: hidden @ weight.T alone, 2,048 rows at a time: a floor of the time.

Writes `results/token_stats.json` (`token_stats_cuda.json` on a GPU) and a section of `RESULTS.md`
beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fresh
import torch
from sections import write_section

from prunery.kernels import token_stats

HERE = Path(__file__).resolve().parent
CASES = ("full", "chunked", "torch", "torch rank", "product")
GPU_CASES = (*CASES, "triton", "triton rank", "liger", "cce")
MODULES = {"triton": "triton", "liger": "liger_kernel", "cce": "cut_cross_entropy"}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    """(nll, entropy, lse) by way of all logits."""
    logits = (hidden @ weight.T).float()
    log_p = torch.log_softmax(logits, 1)
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    return nll, -(log_p.exp() * log_p).sum(1), torch.logsumexp(logits, 1)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    """The same, 512 rows at a time."""
    parts = [
        plain(h, weight, t) for h, t in zip(hidden.split(512), targets.split(512), strict=True)
    ]
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def product(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    """The matrix product alone."""
    for part in hidden.split(2048):
        part @ weight.T


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    """liger-kernel's per-token loss and entropy."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return Function.apply(hidden, weight, targets, return_entropy=True)


def cce(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    """cut-cross-entropy's per-token loss."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none")


def runner(case: str) -> Callable[..., Any]:
    """The function that a case runs."""
    if case in ("torch", "triton"):
        return lambda h, w, t: token_stats(h, w, t, impl=case)
    if case.endswith(" rank"):
        return lambda h, w, t: token_stats(h, w, t, rank=True, impl=case.split()[0])
    made: dict[str, Callable[..., Any]] = {
        "full": plain,
        "chunked": chunked,
        "product": product,
        "liger": liger,
        "cce": cce,
    }
    return made[case]


def inputs(rows: int, size: int, vocabulary: int, given: argparse.Namespace) -> Inputs:
    """Hidden states and weights that give logits of a spread near 3."""
    torch.manual_seed(given.seed)
    like: dict[str, Any] = {"dtype": getattr(torch, given.dtype), "device": given.device}
    hidden = torch.randn(rows, size, **like) * (3.0 / size**0.5)
    weight = torch.randn(vocabulary, size, **like)
    return hidden, weight, torch.randint(vocabulary, (rows,), device=given.device)


@torch.no_grad()
def child(given: argparse.Namespace) -> None:
    """Measure one case and print it."""
    torch.set_num_threads(given.threads)
    run = runner(given.case)
    run(*inputs(min(given.rows, 64), given.size, 512, given))  # loads what is loaded lazily
    made = inputs(given.rows, given.size, given.vocabulary[0], given)
    print(json.dumps(fresh.measure(lambda: run(*made), given.repeats, given.device)))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every case at every vocabulary, each in its own process."""
    wanted = GPU_CASES if given.device == "cuda" else CASES
    options = {name: getattr(given, name) for name in ("rows", "size", "dtype", "device")}
    options |= {name: getattr(given, name) for name in ("repeats", "threads", "seed")}
    where = fresh.machine(given.device, given.threads)
    found: dict[str, Any] = {}
    for vocabulary in given.vocabulary:
        for case in wanted:
            if (module := MODULES.get(case.split()[0])) and find_spec(module) is None:
                made = {"failed": "not installed"}
            else:
                made = fresh.in_child(__file__, case, {**options, "vocabulary": vocabulary})
            found.setdefault(str(vocabulary), {})[case] = made
            print(f"{vocabulary:8d} {case:12s} {fresh.cells(made, None)}", flush=True)
    return {
        "command": fresh.command(__file__),
        "machine": where,
        **options,
        "found": found,
    }


def section(made: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    lines = fresh.preamble(
        "Loss, entropy and log-sum-exp of tokens",
        made,
        f"{made['rows']} rows of {made['size']} {made['dtype']}; median of {made['repeats']}"
        " runs after one.",
    )
    for vocabulary, found in made["found"].items():
        base = fresh.median(found["full"])
        logits = made["rows"] * int(vocabulary) * 4 / 2**20
        lines += [
            "",
            f"Vocabulary {vocabulary} (float32 logits: {logits:.0f} MiB):",
            "",
            "| | ms | low to high | times as fast as full | peak MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [f"| {case} | {fresh.cells(one, base)} |" for case, one in found.items()]
        ours, full = found["torch"], found["full"]
        if "failed" not in ours and "failed" not in full:
            less = full["peak_bytes"] / max(1, ours["peak_bytes"])
            lines += ["", f"`torch` takes {less:.0f} times less memory than `full`."]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", help="measure this one alone, here, and print JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="default 2048, on a GPU 8192")
    parser.add_argument("--size", type=int, help="default 576, on a GPU 4096")
    parser.add_argument("--vocabulary", type=fresh.sizes, help="default 32000,128000; 131072")
    parser.add_argument("--dtype", help="default float32, on a GPU bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    given.rows = given.rows or (8192 if cuda else 2048)
    given.size = given.size or (4096 if cuda else 576)
    given.vocabulary = given.vocabulary or ([131072] if cuda else [32000, 128000])
    given.dtype = given.dtype or ("bfloat16" if cuda else "float32")
    if given.case:
        child(given)
        return
    made = measure(given)
    name = "token_stats_cuda" if cuda else "token_stats"
    fresh.save(given.results, name, made)
    text = section(made)
    write_section(given.results / "RESULTS.md", name.replace("_", "-"), text)
    print(text)


if __name__ == "__main__":
    main()
