"""Time and memory of `kernels.attention_mass` against the whole attention matrix.

    python benchmarks/attention_mass.py
    python benchmarks/attention_mass.py --device cuda

Random queries and keys, the first half of the keys chosen. Shapes (heads, key heads, queries,
keys, size), causal except on a GPU, where flash attention counts positions otherwise:

- a short window of queries over many keys, a square, and (ours alone, once) a square of 131,072,
  whose matrix would take 64 GiB a head;
- on a GPU a window of 64 over 16,384 keys too, against two passes: flash attention's
  log-sum-exp over all keys and over the chosen ones, then the columns from that.

Cases: `matrix` holds all attention, as `output_attentions` does; `torch` and `triton` are ours;
`two passes` is the flash baseline. Writes `results/attention_mass.json`
(`attention_mass_cuda.json` on a GPU) and a section of `RESULTS.md` beside this file.
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

from prunery.kernels import attention_mass

HERE = Path(__file__).resolve().parent
LARGEST = 1 << 33  # bytes of float32 attention that `matrix` is asked to hold
SHAPES = ([8, 2, 64, 131072, 64], [8, 2, 2048, 2048, 64], [1, 1, 131072, 131072, 64])
GPU_SHAPES = ([32, 8, 64, 16384, 128], [32, 8, 64, 131072, 128], [32, 8, 131072, 131072, 128])
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def matrix(query: torch.Tensor, key: torch.Tensor, chosen: torch.Tensor, causal: bool) -> Any:
    """(row, column) from the whole matrix."""
    whole = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ whole.mT).float() * query.shape[3] ** -0.5
    if causal:
        queries, keys = logits.shape[2:]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        logits.masked_fill_(~seen.tril(keys - queries), -torch.inf)
    attention = torch.softmax(logits, 3)
    return attention @ chosen[0].float(), attention.sum(2)


def two_passes(query: torch.Tensor, key: torch.Tensor, chosen: torch.Tensor, causal: bool) -> Any:
    """Rows from two log-sum-exps of flash attention; columns from the first, key by key."""
    if causal:
        raise ValueError("flash attention aligns positions at the top left")
    whole = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    every = flash(query, whole, whole)[1]
    first = whole[:, :, : int(chosen.sum())].contiguous()
    row = torch.exp(flash(query, first, first)[1] - every)
    column = []
    for part in whole.split(16384, 2):
        logits = (query @ part.mT).float() * query.shape[3] ** -0.5
        column.append(torch.exp(logits - every[..., None]).sum(2))
    return row, torch.cat(column, 2)


def runner(case: str, causal: bool) -> Callable[..., Any]:
    """The function that a case runs."""
    if case == "matrix":
        return lambda q, k, c: matrix(q, k, c, causal)
    if case == "two passes":
        return lambda q, k, c: two_passes(q, k, c, causal)
    return lambda q, k, c: attention_mass(
        q, k, key_columns=c, scale=q.shape[3] ** -0.5, causal=causal, impl=case
    )


def inputs(shape: list[int], given: argparse.Namespace) -> Inputs:
    """One batch item; the first half of the keys is chosen."""
    heads, key_heads, queries, keys, size = shape
    torch.manual_seed(given.seed)
    like: dict[str, Any] = {"dtype": getattr(torch, given.dtype), "device": given.device}
    query = torch.randn(1, heads, queries, size, **like)
    key = torch.randn(1, key_heads, keys, size, **like)
    return query, key, torch.arange(keys, device=given.device)[None] < keys // 2


@torch.no_grad()
def child(given: argparse.Namespace) -> None:
    """Measure one case and print it."""
    torch.set_num_threads(given.threads)
    run = runner(given.case, given.device == "cpu")
    heads, key_heads, queries, keys, size = shape = given.shapes[0]
    run(*inputs([heads, key_heads, min(queries, 64), min(keys, 128), size], given))
    made = inputs(shape, given)
    # A square that takes a minute is run once for memory and once for time.
    repeats = 1 if queries * keys * heads > 1 << 32 and given.device == "cpu" else given.repeats
    print(json.dumps(fresh.measure(lambda: run(*made), repeats, given.device)))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every case at every shape, each in its own process."""
    cuda = given.device == "cuda"
    wanted = ("matrix", "two passes", "torch", "triton") if cuda else ("matrix", "torch")
    options = {name: getattr(given, name) for name in ("dtype", "device")}
    options |= {name: getattr(given, name) for name in ("repeats", "threads", "seed")}
    where = fresh.machine(given.device, given.threads)
    found: dict[str, Any] = {}
    for shape in given.shapes:
        name = " x ".join(map(str, shape))
        bytes_held = 4 * shape[0] * shape[2] * shape[3]
        for case in wanted:
            if case == "triton" and find_spec("triton") is None:
                made = {"failed": "not installed"}
            elif case in ("matrix", "two passes") and bytes_held > LARGEST:
                made = {"failed": f"not tried: {bytes_held / 2**30:.0f} GiB"}
            else:
                shapes = ",".join(map(str, shape))
                made = fresh.in_child(__file__, case, {**options, "shapes": shapes})
            found.setdefault(name, {})[case] = made
            print(f"{name:32s} {case:12s} {fresh.cells(made, None)}", flush=True)
    return {
        "command": fresh.command(__file__),
        "machine": where,
        **options,
        "found": found,
    }


def section(made: dict[str, Any]) -> str:
    """The table for RESULTS.md."""
    lines = fresh.preamble(
        "Attention mass of rows and columns",
        made,
        f"{made['dtype']}; median of {made['repeats']} runs after one (of one, where it takes"
        " a minute).",
    )
    for shape, found in made["found"].items():
        heads, _, queries, keys, _ = map(int, shape.split(" x "))
        base = fresh.median(found["matrix"])
        lines += [
            "",
            f"Heads x key heads x queries x keys x size {shape}"
            f" (matrix: {4 * heads * queries * keys / 2**20:.0f} MiB):",
            "",
            "| | ms | low to high | times as fast as matrix | peak MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [f"| {case} | {fresh.cells(one, base)} |" for case, one in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", help="measure this one alone, here, and print JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes",
        type=lambda text: [list(fresh.sizes(one)) for one in text.split(";")],
        help="heads,key heads,queries,keys,size; semicolons between shapes",
    )
    parser.add_argument("--dtype", help="default float32, on a GPU bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    given.dtype = given.dtype or ("bfloat16" if cuda else "float32")
    given.shapes = given.shapes or list(GPU_SHAPES if cuda else SHAPES)
    if given.case:
        child(given)
        return
    made = measure(given)
    name = "attention_mass_cuda" if cuda else "attention_mass"
    fresh.save(given.results, name, made)
    text = section(made)
    write_section(given.results / "RESULTS.md", name.replace("_", "-"), text)
    print(text)


if __name__ == "__main__":
    main()
