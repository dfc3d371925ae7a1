"""Time and memory of exact k-center, and of the kernels `k_center_step` and `pairwise_topk`.

    python benchmarks/k_center.py
    python benchmarks/k_center.py --device cuda       # the kernels alone

Unit rows of float32, seeded: in 1,000 clusters of unlike size and width, and without clusters.

- `ours`: `farthest_first` of `prunery.pruners.sample.farthest`; `ours, picks alone`: without the
  last distances of the rows not chosen.
- `numpy`: a running minimum as one would write it, a product of all rows with each pick. At the
  smaller sizes 200 picks of it, times ten: each costs the same.
- Kernels: ours in torch (and in Triton on a GPU), the same in one torch expression (`plain`), and
  for top-k also faiss, where there is no GPU.

apricot-select has no k-center; its nearest objective, facility location, holds all pairs.

Both start from the same row. Where picks differ, the two rows' distances in float64 are compared.

Writes `results/k_center.json` (`k_center_cuda.json` on a GPU) and a section of `RESULTS.md` beside
this file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import numpy.typing as npt
import torch
from sections import write_section

from prunery.kernels import k_center_step, pairwise_topk
from prunery.pruners.sample.farthest import farthest_first, nearest_to_mean

HERE = Path(__file__).resolve().parent
SIZE = 384
CLUSTERS = 1000
FEW = 10  # one in so many picks are made where a case is not run to its end
NEIGHBOURS = 100
Rows = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


def rows_of(kind: str, count: int, seed: int) -> Rows:
    """(count, 384) float32 unit rows, "clustered" or "spread"."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((count, SIZE), dtype=np.float32)
    if kind == "clustered":
        share = 1.0 / (10.0 + np.arange(CLUSTERS))
        cluster = draw.choice(CLUSTERS, size=count, p=share / share.sum())
        rows *= draw.uniform(0.3, 1.0, CLUSTERS).astype(np.float32)[cluster, None]
        rows += draw.standard_normal((CLUSTERS, SIZE), dtype=np.float32)[cluster]
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def running_minimum(rows: Rows, count: int, start: int) -> Places:
    """k-center in plain NumPy: the picks."""
    distance = np.full(len(rows), 3.0, np.float32)
    chosen = np.zeros(count, np.int64)
    row = start
    for step in range(count):
        chosen[step] = row
        np.minimum(distance, 1.0 - rows @ rows[row], out=distance)
        distance[row] = -1.0
        row = int(distance.argmax())
    return chosen


def timed(call: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Seconds and peak bytes of one call, and what it gave."""
    fresh.forget_peak()
    before = fresh.resident("VmRSS")
    start = time.perf_counter()
    made = call()
    seconds = time.perf_counter() - start
    return {"seconds": [seconds], "peak_bytes": fresh.resident("VmHWM") - before}, made


def choose(given: argparse.Namespace) -> dict[str, Any]:
    """One case of k-center."""
    rows = rows_of(given.kind, given.rows, given.seed)
    start = nearest_to_mean(rows)
    if given.case == "numpy":
        made, chosen = timed(lambda: running_minimum(rows, given.picks, start))
    else:
        whole = given.case == "ours"
        farthest_first(rows[:2000], 20, start=0)
        made, found = timed(lambda: farthest_first(rows, given.picks, start=start, distances=whole))
        chosen = found[0]
        if whole:
            made["furthest_row"] = float(np.delete(found[1], chosen).max())
    path = Path(given.kept)
    if not path.exists():
        np.save(path, chosen)
    elif given.case == "ours":
        made |= compare(rows, chosen, np.load(path))
    return made


def compare(
    rows: Rows, ours: npt.NDArray[np.int64], other: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """How far two lists of picks agree, and what parts them first."""
    ours = ours[: len(other)]
    same = ours == other
    made = {
        "compared": len(other),
        "same_places": int(same.sum()),
        "same_rows": len(np.intersect1d(ours, other)),
    }
    if not same.all():
        first = int(same.argmin())
        before = rows[ours[:first]].astype(np.float64)
        pair = [float((1 - before @ rows[one[first]]).min()) for one in (ours, other)]
        made |= {"first_difference": first, "float64_gap": pair[0] - pair[1]}
    return made


def plain_step(points: torch.Tensor, centre: torch.Tensor, distance: torch.Tensor) -> Any:
    """`k_center_step` in one expression."""
    torch.minimum(distance, 1.0 - points @ centre, out=distance)
    return distance.max(0)


def plain_topk(queries: torch.Tensor, points: torch.Tensor) -> Any:
    """Top-k of 512 queries at a time against all points."""
    return [(part @ points.T).topk(NEIGHBOURS, 1) for part in queries.split(512)]


def faiss_topk(queries: torch.Tensor, points: torch.Tensor) -> Any:
    """faiss's exact search."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss.knn(queries.numpy(), points.numpy(), NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)


def kernel(given: argparse.Namespace) -> dict[str, Any]:
    """One case of a kernel."""
    name, impl = given.case.split()
    torch.manual_seed(given.seed)
    points = torch.randn(given.rows, SIZE, device=given.device)
    points = torch.nn.functional.normalize(points, dim=1)
    if name == "step":
        distance = torch.full((len(points),), 3.0, device=given.device)
        run = plain_step if impl == "plain" else step_with(impl)
        return fresh.measure(lambda: run(points, points[0], distance), given.repeats, given.device)
    queries = points[: given.queries].clone()
    made: dict[str, Callable[..., Any]] = {"plain": plain_topk, "faiss": faiss_topk}
    find = made.get(impl) or (lambda q, p: pairwise_topk(q, p, NEIGHBOURS, impl=impl))
    find(queries[:8], points[:2000])
    return fresh.measure(lambda: find(queries, points), given.repeats, given.device)


def step_with(impl: str) -> Callable[..., Any]:
    """`k_center_step` by `impl`."""
    return lambda points, centre, distance: k_center_step(points, centre, distance, impl=impl)


@torch.no_grad()
def child(given: argparse.Namespace) -> None:
    """Measure one case and print it."""
    torch.set_num_threads(given.threads)
    is_kernel = given.case.startswith(("step ", "topk "))
    print(json.dumps(kernel(given) if is_kernel else choose(given)))


def measure_choice(given: argparse.Namespace) -> dict[str, Any]:
    """Ours and plain NumPy over sizes and kinds; plain first, its picks are compared with."""
    found: dict[str, Any] = {}
    whole = max(given.sizes)
    for kind, count in [*(("clustered", one) for one in given.sizes), ("spread", given.spread)]:
        few = kind == "clustered" and count < whole
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "kind": kind,
                "rows": count,
                "seed": given.seed,
                "threads": given.threads,
                "kept": f"{folder}/picks.npy",
            }
            for case in ("numpy", "ours", "ours, picks alone"):
                picks = given.picks // FEW if few and case == "numpy" else given.picks
                made = fresh.in_child(__file__, case, {**options, "picks": picks})
                if picks < given.picks and "failed" not in made:
                    made["seconds"] = [one * FEW for one in made["seconds"]]
                    made["picks_timed"] = picks
                found.setdefault(f"{kind} {count}", {})[case] = made
                print(f"{kind:10s} {count:8d} {case:18s} {fresh.cells(made, None)}", flush=True)
    return found


def measure_kernels(given: argparse.Namespace) -> dict[str, Any]:
    """The kernels' cases."""
    cuda = given.device == "cuda"
    impls = {"step": ["plain", "torch"], "topk": ["plain", "torch"]}
    for name, cases in impls.items():
        cases += ["triton"] if cuda else ["faiss"] if name == "topk" else []
    options = {name: getattr(given, name) for name in ("seed", "threads", "device", "repeats")}
    options |= {"rows": given.rows, "queries": given.queries}
    found: dict[str, Any] = {}
    for name, cases in impls.items():
        for impl in cases:
            made = fresh.in_child(__file__, f"{name} {impl}", options)
            found.setdefault(name, {})[impl] = made
            print(f"{name} {impl:10s} {fresh.cells(made, None)}", flush=True)
    return found


def table(found: dict[str, Any], against: str) -> list[str]:
    """Lines of a table of cases."""
    base = fresh.median(found[against])
    return [
        "",
        f"| | ms | low to high | times as fast as {against} | peak MiB |",
        "|---|---:|---:|---:|---:|",
        *(f"| {case} | {fresh.cells(one, base)} |" for case, one in found.items()),
    ]


def agreement(made: dict[str, Any]) -> str:
    """A sentence on whether the picks are the same."""
    text = (
        f"{made['same_places']} of {made['compared']} picks are the same at the same place,"
        f" {made['same_rows']} the same at any"
    )
    if "float64_gap" not in made:
        return f"{text}."
    return (
        f"{text}; where they first differ (pick {made['first_difference']}), ours is further in"
        f" float64 by {made['float64_gap']:.1e}."
    )


def choice_lines(made: dict[str, Any]) -> list[str]:
    """The section's part on k-center."""
    lines = []
    for name, cases in made["choice"].items():
        kind, count = name.split()
        timed_picks = cases["numpy"].get("picks_timed")
        note = f" (numpy: {timed_picks} picks, times {FEW})" if timed_picks else ""
        lines += ["", f"{int(count):,} {kind} rows, {made['picks']} picks{note}:"]
        lines += table(cases, "numpy")
        if "same_places" in cases["ours"]:
            lines += ["", agreement(cases["ours"])]
    return lines


def section(made: dict[str, Any], device: str) -> str:
    """The text for RESULTS.md."""
    title = "k-center and exact top-k" + (" on a GPU" if device == "cuda" else "")
    lines = fresh.preamble(
        title,
        made,
        f"Rows of {SIZE} float32. k-center ran once a case, kernels {made['repeats']} times"
        " after one.",
    )
    lines += choice_lines(made) if "choice" in made else []
    words = {
        "step": f"`k_center_step`, {made['rows']:,} rows:",
        "topk": f"`pairwise_topk`, the {NEIGHBOURS} best of {made['rows']:,} rows for each of"
        f" {made['queries']:,}:",
    }
    for name, cases in made["kernels"].items():
        lines += ["", words[name], *table(cases, "plain")]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", help="measure this one alone, here, and print JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", type=fresh.sizes, default=[125000, 250000, 500000, 1000000])
    parser.add_argument("--spread", type=int, default=100000, help="rows without clusters")
    parser.add_argument("--picks", type=int, default=2000)
    parser.add_argument("--rows", type=int, help="of the kernels; default 200000, 1000000 on a GPU")
    parser.add_argument("--queries", type=int, help="default 1024, on a GPU 8192")
    parser.add_argument("--kind", choices=["clustered", "spread"], default="clustered")
    parser.add_argument("--kept", default="", help="file of picks to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    given.rows = given.rows or (1_000_000 if cuda else 200_000)
    given.queries = given.queries or (8192 if cuda else 1024)
    if given.case:
        child(given)
        return
    # NumPy's BLAS reads it when a child starts.
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    made = {
        "command": fresh.command(__file__),
        "machine": fresh.machine(given.device, given.threads),
        **{name: getattr(given, name) for name in ("seed", "picks", "rows", "queries", "repeats")},
    }
    if not cuda:
        made["choice"] = measure_choice(given)
    made["kernels"] = measure_kernels(given)
    name = "k_center_cuda" if cuda else "k_center"
    fresh.save(given.results, name, made)
    text = section(made, given.device)
    write_section(given.results / "RESULTS.md", name.replace("_", "-"), text)
    print(text)


if __name__ == "__main__":
    main()
