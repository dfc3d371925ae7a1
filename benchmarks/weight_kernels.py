"""Time of the kernels over weights, and their share of what the machine can do.

    python benchmarks/weight_kernels.py
    python benchmarks/weight_kernels.py --device cuda
    python benchmarks/weight_kernels.py --small          # a quarter of the sides, for a look

Every group has ours and what a library or a plain expression takes for the same result:

- `wanda_mask` by half of each row, and 2:4: a stable sort of float scores as in the published
  code (`sort`), topk of them (`topk`).
- `hadamard`: the product with the matrix (`matrix`).
- `sparse_gated_mlp` with a tenth to three fifths of the neurons alive: the dense MLP (`dense`).
- `int4_matmul`: the dense product in the same dtype (`dense`), torch's kernel (`library`).
- `sparse24_linear`, on a GPU alone: the dense product. `Gate24.of_timings` reads `gate24` of the
  results.
- `column_square_sums`: torch's `square().sum(0)`, and its norm.

Roofline: the bytes that a definition must move (inputs read and outputs written once, of an MLP's
weights those of live neurons) and its operations are counted by formula. Their ceilings are
measured in the same run: the faster of a copy and a sum of 256 MiB, and a product of matrices in
float32 and in bfloat16. The share is the larger of the two times at the ceilings over the time
taken; what stays in a cache between runs can pass 1.

Writes `results/weight_kernels.json` (`weight_kernels_cuda.json` on a GPU) and a section of
`RESULTS.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fresh
import torch
from sections import write_section
from torch.nn import functional

from prunery.kernels import (
    Gate24,
    column_square_sums,
    hadamard_matrix,
    int4_matmul,
    pack_int4,
    prepare_int4,
    sparse24_linear,
    sparse_gated_mlp,
    wanda_mask,
)
from prunery.kernels.hadamard import hadamard
from prunery.kernels.sparse24 import sparse24

HERE = Path(__file__).resolve().parent
GROUP = 128
SHARES = (0.1, 0.3, 0.5, 0.6)
GATE_ROWS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: calls by name, the first to compare with, bytes and operations."""

    title: str
    dtype: str
    bytes_moved: float
    operations: float
    calls: dict[str, Callable[[], Any]]


def impls(device: str) -> list[str]:
    """Implementations worth timing."""
    return ["torch", "triton"] if device == "cuda" and find_spec("triton") else ["torch"]


def wanda_cases(sides: tuple[int, int], device: str) -> Iterator[Case]:
    """Half of each row, and 2:4."""
    weight = torch.randn(sides, device=device)
    norm = torch.randn(sides[1], device=device).exp()
    cells, half = weight.numel(), sides[1] // 2

    def by_sort() -> torch.Tensor:
        order = torch.sort(weight.abs() * norm, dim=1, stable=True).indices[:, :half]
        return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order, False)

    def by_topk() -> torch.Tensor:
        score = weight.abs() * norm
        return score >= score.topk(half, 1, sorted=False).values.amin(1, keepdim=True)

    def groups() -> torch.Tensor:
        score = (weight.abs() * norm).view(-1, 4)
        made = torch.zeros_like(score, dtype=torch.bool)
        return made.scatter_(1, score.topk(2, 1).indices, True).view(weight.shape)

    for words, library, options in (
        ("half of each row", {"sort": by_sort, "topk": by_topk}, {"keep": 0.5}),
        ("2:4", {"topk": groups}, {"pattern": (2, 4)}),
    ):
        ours = {
            f"ours, {impl}": lambda impl=impl, options=options: wanda_mask(
                weight, norm, **options, impl=impl
            )
            for impl in impls(device)
        }
        yield Case(
            f"wanda_mask, {words}, {sides[0]} x {sides[1]}",
            "float32",
            4.0 * cells + cells,
            2.0 * cells,
            {**library, **ours},
        )


def norm_cases(rows: int, size: int, device: str) -> Iterator[Case]:
    """Sums of squares of columns."""
    x = torch.randn(rows, size, device=device)
    out = torch.zeros(size, device=device)
    yield Case(
        f"column_square_sums, {rows} x {size}",
        "float32",
        4.0 * x.numel(),
        2.0 * x.numel(),
        {
            "square().sum(0)": lambda: x.square().sum(0),
            "vector_norm(dim=0)": lambda: torch.linalg.vector_norm(x, dim=0).square(),
            "ours, torch": lambda: column_square_sums(x, out),
        },
    )


def hadamard_cases(rows: int, size: int, device: str) -> Iterator[Case]:
    """Rotations by one block."""
    x = torch.randn(rows, size, device=device)
    matrix = hadamard_matrix(size, device=device)
    calls: dict[str, Callable[[], Any]] = {"matrix": lambda: x @ matrix}
    for impl in impls(device):
        calls[f"ours, {impl}"] = lambda impl=impl: hadamard(x, impl=impl)
    log = size.bit_length() - 1
    yield Case(
        f"hadamard, {rows} x {size}", "float32", 8.0 * x.numel(), float(log * x.numel()), calls
    )


def mlp_cases(size: int, neurons: int, dtype: str, device: str) -> Iterator[Case]:
    """One token, with some neurons alive."""
    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    gate, up, down_t = (torch.randn(neurons, size, **like) * 0.02 for _ in range(3))
    down = down_t.T.contiguous()
    x = torch.randn(1, size, **like)
    acted = functional.silu(functional.linear(x, gate)).float().abs()[0]
    for share in SHARES:
        limit = float(acted.quantile(1 - share))
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda: functional.linear(
                functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down
            )
        }
        for impl in impls(device):
            calls[f"ours, {impl}"] = lambda impl=impl, limit=limit: sparse_gated_mlp(
                x, gate, up, down_t, limit, impl=impl
            )
        read = (1 + 2 * share) * gate.numel()
        yield Case(
            f"gated MLP, {neurons} x {size}, {share:.0%} alive",
            dtype,
            read * gate.element_size(),
            2 * read,
            calls,
        )


def int4_cases(size: int, dtype: str, device: str) -> Iterator[Case]:
    """Products with a square 4-bit weight."""
    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    values = torch.randint(-8, 8, (size, size), device=device).to(torch.int8)
    scale = torch.rand(size, size // GROUP, device=device).add(0.5).bfloat16() * 0.01
    packed = pack_int4(values)
    dense = (values.view(size, -1, GROUP) * scale[:, :, None]).view(size, size).to(like["dtype"])
    prepared = prepare_int4(packed, scale, None, GROUP, size)
    for rows in (1, 8, 64):
        x = torch.randn(rows, size, **like)
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda x=x: functional.linear(x, dense),
        }
        if prepared is not None and dtype == "bfloat16":
            from prunery.kernels.int4_library import product

            calls["library"] = lambda x=x: product(x, prepared)
        for impl in impls(device):
            calls[f"ours, {impl}"] = lambda x=x, impl=impl: int4_matmul(
                x, packed, scale, None, GROUP, impl=impl
            )
        moved = values.numel() / 2 + 2 * scale.numel() + 2.0 * x.numel() * x.element_size()
        yield Case(
            f"int4_matmul, {rows} x {size} x {size}",
            dtype,
            moved,
            2.0 * rows * values.numel(),
            calls,
        )


def sparse_cases(sides: tuple[int, int], device: str) -> Iterator[Case]:
    """2:4 products on a GPU; on a CPU they are dense."""
    weight = torch.randn(sides, device=device, dtype=torch.bfloat16)
    weight *= wanda_mask(weight, torch.ones(sides[1], device=device), pattern=(2, 4))
    made = sparse24(weight, gate=Gate24({sides: 1}))
    if made.compressed is None:
        return
    for rows in GATE_ROWS:
        x = torch.randn(rows, sides[1], device=device, dtype=torch.bfloat16)
        yield Case(
            f"2:4, {rows} x {sides[1]} x {sides[0]}",
            "bfloat16",
            1.125 * weight.numel() + 2.0 * (x.numel() + rows * sides[0]),
            float(rows * weight.numel()),
            {
                "dense": lambda x=x: functional.linear(x, weight),
                "sparse": lambda x=x: sparse24_linear(x, made),
            },
        )


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """All of them, one after the other, so that one's tensors go before the next come."""
    side = 1024 if given.small else 4096
    wide = 2816 if given.small else 11008
    yield from wanda_cases((side, side), given.device)
    yield from wanda_cases((side, wide), given.device)
    yield from norm_cases(side // 2, side, given.device)
    yield from hadamard_cases(side // 2, side, given.device)
    yield from hadamard_cases(2 * side, side // 8, given.device)
    for dtype in ("float32", "bfloat16"):
        yield from mlp_cases(side, wide, dtype, given.device)
        yield from int4_cases(side, dtype, given.device)
    if given.device == "cuda":
        for sides in ((side, side), (wide, side), (side, wide)):
            yield from sparse_cases(sides, given.device)


def ceilings(given: argparse.Namespace) -> dict[str, float]:
    """Bytes a second of a stream, operations a second of a product in both dtypes."""
    cells = 1 << (25 if given.small else 26)
    source = torch.ones(cells, device=given.device)
    target = torch.empty_like(source)
    stream = max(
        8.0 * cells / best(lambda: target.copy_(source), given),
        4.0 * cells / best(source.sum, given),
    )
    side = 1024 if given.small else (8192 if given.device == "cuda" else 2048)
    found = {"stream": stream}
    for dtype in ("float32", "bfloat16"):
        left = torch.randn(side, side, device=given.device).to(getattr(torch, dtype))
        right = left.T.contiguous()
        found[dtype] = 2.0 * side**3 / best(lambda a=left, b=right: a @ b, given)
    return found


def best(call: Callable[[], Any], given: argparse.Namespace) -> float:
    """The least seconds of a call."""
    return float(min(fresh.measure(call, given.repeats, given.device)["seconds"]))


def roofline(case: Case, seconds: float, top: dict[str, float]) -> float:
    """Share of the nearer ceiling that was reached."""
    return max(case.bytes_moved / top["stream"], case.operations / top[case.dtype]) / seconds


@torch.no_grad()
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every case in this process, its ceilings first."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    where = fresh.machine(given.device, given.threads)
    top = ceilings(given)
    print(json.dumps(top), flush=True)
    found: list[dict[str, Any]] = []
    for case in cases(given):
        taken = {}
        for name, call in case.calls.items():
            made = fresh.measure(call, given.repeats, given.device)
            middle = float(sorted(made["seconds"])[len(made["seconds"]) // 2])
            taken[name] = {**made, "share": roofline(case, middle, top)}
            print(f"{case.title:44s} {case.dtype:9s} {name:20s} {1000 * middle:9.2f} ms")
        found.append(
            {
                "title": case.title,
                "dtype": case.dtype,
                "bytes": case.bytes_moved,
                "operations": case.operations,
                "found": taken,
            }
        )
    return {
        "command": fresh.command(__file__),
        "machine": where,
        "seed": given.seed,
        "repeats": given.repeats,
        "ceilings": top,
        "cases": found,
        "gate24": gate_rows(found),
    }


def gate_rows(found: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What `Gate24.of_timings` reads."""
    rows = []
    for case in found:
        if not case["title"].startswith("2:4"):
            continue
        count, inputs, outputs = (int(one) for one in case["title"][5:].split(" x "))
        taken = {name: fresh.median(made) for name, made in case["found"].items()}
        rows.append({"rows": count, "in": inputs, "out": outputs, **taken})
    return rows


def section(made: dict[str, Any], device: str) -> str:
    """The text for RESULTS.md."""
    top = made["ceilings"]
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "## Kernels over weights" + (" on a GPU" if device == "cuda" else ""),
        "",
        f"`{made['command']}`",
        "",
        f"{where['gpu'] or where['processor']}, {where['threads']} threads, Python"
        f" {where['python']}, {versions}. Load average at the start {where['load_before']:.1f}."
        f" Seed {made['seed']}; median of {made['repeats']} runs after one, all in one process.",
        "",
        f"Ceilings measured in the run: {top['stream'] / 1e9:.0f} GB/s,"
        f" {top['float32'] / 1e9:.0f} GFLOP/s in float32, {top['bfloat16'] / 1e9:.0f} in bfloat16."
        " The share is of the nearer ceiling, for bytes and operations counted by formula; what"
        " stays in a cache between runs can pass it.",
        "",
        "| | dtype | MB | Mop | by | ms | low to high | times as fast as the first | share |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for case in made["cases"]:
        base = None
        for name, one in case["found"].items():
            middle = fresh.median(one) or 0.0
            base = base or middle
            head = ["", "", "", ""]
            if name == next(iter(case["found"])):
                head = [
                    case["title"],
                    case["dtype"],
                    f"{case['bytes'] / 1e6:.1f}",
                    f"{case['operations'] / 1e6:.0f}",
                ]
            low, high = (1000 * pick(one["seconds"]) for pick in (min, max))
            lines.append(
                f"| {' | '.join(head)} | {name} | {1000 * middle:.2f} | {low:.2f} to {high:.2f}"
                f" | {base / middle:.2f} | {one['share']:.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--small", action="store_true", help="a quarter of the sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    made = measure(given)
    name = "weight_kernels_cuda" if given.device == "cuda" else "weight_kernels"
    fresh.save(given.results, name, made)
    text = section(made, given.device)
    write_section(given.results / "RESULTS.md", name.replace("_", "-"), text)
    print(text)


if __name__ == "__main__":
    main()
