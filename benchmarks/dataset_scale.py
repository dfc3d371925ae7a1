"""Near-duplicates and KNN-Shapley over a million embeddings, beside semhash and cleanlab.

    python benchmarks/dataset_scale.py --part dedup
    python benchmarks/dataset_scale.py --part shapley

Rows are made: unit vectors of 384 float32 around 5,000 topics in 100 groups.

- dedup: a tenth of the rows are copies of others at a cosine drawn from 0.9 to 1; pairs from
  0.95 on are duplicates. Ours is spherical k-means (about sqrt(n) clusters), the nearest centre
  of each row, and SemDeDup inside clusters. Recall is the share of such pairs of which one row
  was dropped: of the planted ones, and of all that an exact search finds for a sample of rows.
  Peers at smaller sizes: `semhash` on the same vectors (exact and approximate ones are its
  own choice), and `near_duplicate`, our exact search over all pairs.
- shapley: labels are the groups, a twentieth of them wrong; k 10, depth 100, 1,000 validation
  rows. Checked against the exact form on some of them. Peer at smaller sizes: `cleanlab`, whose
  form (depth k, rows valued by each other) ours takes there too.

The peers are optional: pip install -c constraints.txt semhash cleanlab. Writes
`results/dataset_dedup.json` or `results/dataset_shapley.json`, and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import numpy.typing as npt
from sections import write_section

from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.sample.near_duplicate import NearDuplicate
from prunery.pruners.sample.semdedup import SemDeDup
from prunery.pruners.signals.shapley import knn_shapley
from prunery.storage import VectorIndex, nearest_centres, spherical_kmeans

HERE = Path(__file__).resolve().parent
D = 384
GROUPS, TOPICS = 100, 5000
DISTANCE = 0.05
K, DEPTH, VALIDATION = 10, 100, 1000
SIZES = {"dedup": "125000,250000,500000,1000000", "shapley": "125000,250000,500000,1000000"}
PEER_SIZES = {"dedup": "20000,60000", "shapley": "5000,15000"}
PEERS = {"dedup": ("ours", "semhash", "near_duplicate"), "shapley": ("ours", "cleanlab")}
PACKAGES = ("numpy", "faiss-cpu", "semhash", "usearch", "cleanlab", "scikit-learn")
_BLOCK = 65_536

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def unit(vectors: Floats) -> Floats:
    """Rows scaled to length 1, in place."""
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def normal(rng: np.random.Generator, n: int) -> Floats:
    """Directions of no preference, (n, 384)."""
    return unit(rng.standard_normal((n, D), dtype=np.float32))


class Topics:
    """Where rows come from: topics in groups."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.group = rng.integers(0, GROUPS, TOPICS)
        self.centre = unit(normal(rng, GROUPS)[self.group] + normal(rng, TOPICS))

    def rows(self, rng: np.random.Generator, n: int) -> tuple[Floats, Ints]:
        """Unit vectors (n, 384) and the group of each (n,)."""
        vectors, topic = np.empty((n, D), np.float32), rng.integers(0, TOPICS, n)
        for start in range(0, n, _BLOCK):
            mine = topic[start : start + _BLOCK]
            noise = normal(rng, len(mine))
            vectors[start : start + _BLOCK] = unit(self.centre[mine] + np.float32(0.8) * noise)
        return vectors, self.group[topic]


def with_copies(n: int, seed: int) -> tuple[Floats, Ints, Floats]:
    """n rows of which the last tenth are copies; the source and the cosine of each copy."""
    rng = np.random.default_rng(seed + 1)
    copies = n // 10
    vectors = np.empty((n, D), np.float32)
    vectors[: n - copies], _ = Topics(seed).rows(rng, n - copies)
    source = rng.integers(0, n - copies, copies)
    cosine = rng.uniform(0.9, 1.0, copies).astype(np.float32)
    for start in range(0, copies, _BLOCK):
        origin, c = vectors[source[start : start + _BLOCK]], cosine[start : start + _BLOCK, None]
        away = normal(rng, len(origin))
        away = unit(away - (away * origin).sum(axis=1, keepdims=True) * origin)
        place = n - copies + start
        vectors[place : place + len(origin)] = c * origin + np.sqrt(1 - c * c) * away
    return vectors, source, cosine


def once(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives, its seconds, and its peak bytes above what was in use."""
    fresh.forget_peak()
    before, start = fresh.resident("VmRSS"), time.perf_counter()
    made = call()
    seconds = time.perf_counter() - start
    return made, {"seconds": seconds, "peak_bytes": fresh.resident("VmHWM") - before}


# -- near-duplicates ---------------------------------------------------------------------------


def semdedup(vectors: Floats, given: argparse.Namespace) -> tuple[npt.NDArray[np.bool_], Any]:
    """Kept rows by k-means and SemDeDup, and the seconds of each part."""
    marks = [time.perf_counter()]
    ids = np.arange(len(vectors))
    clusters = max(1, round(len(vectors) ** 0.5 / 2))
    drawn = np.lexsort((ids, rules.uniform(given.seed, ids)))[: 128 * clusters]
    centres = spherical_kmeans(vectors[drawn], clusters, threads=given.threads)
    marks.append(time.perf_counter())
    cluster, away = nearest_centres(vectors, centres, threads=given.threads)
    marks.append(time.perf_counter())
    signals = Signals(
        {"id": ids, "embedding": vectors, "cluster": cluster, "centroid_distance": away}
    )
    keep = SemDeDup(distance=DISTANCE)(signals, seed=given.seed).keep
    marks.append(time.perf_counter())
    names = ("k_means", "assignment", "semdedup")
    return keep, dict(zip(names, np.diff(marks).tolist(), strict=True))


def semhash(vectors: Floats, given: argparse.Namespace) -> tuple[npt.NDArray[np.bool_], Any]:
    """Rows that semhash selects, from the same vectors at the same threshold."""
    from semhash import SemHash

    # The encoder is for texts to come; none does.
    made = SemHash.from_embeddings(vectors, [str(i) for i in range(len(vectors))], model=None)
    keep = np.zeros(len(vectors), np.bool_)
    keep[[int(row) for row in made.self_deduplicate(threshold=1 - DISTANCE).selected]] = True
    return keep, {}


def near_duplicate(vectors: Floats, given: argparse.Namespace) -> tuple[Any, Any]:
    """Rows kept by the exact search over all pairs."""
    signals = Signals({"id": np.arange(len(vectors)), "embedding": vectors})
    return NearDuplicate(distance=DISTANCE)(signals, seed=given.seed).keep, {}


def recall(vectors: Floats, keep: npt.NDArray[np.bool_], source: Ints, cosine: Floats) -> Any:
    """Share of duplicate pairs of which one row was dropped: planted, and found exactly."""
    n = len(vectors)
    copy = np.arange(n - len(source), n)
    broken = ~(keep[copy] & keep[source])
    sample = np.random.default_rng(0).choice(copy, min(1000, len(copy)), replace=False)
    pairs = found = 0
    for start in range(0, n, _BLOCK):
        near = vectors[sample] @ vectors[start : start + _BLOCK].T >= 1 - DISTANCE
        a, b = np.nonzero(near)
        rows, others = sample[a], start + b
        real = rows != others
        pairs += int(real.sum())
        found += int((~(keep[rows[real]] & keep[others[real]])).sum())
    return {
        "kept": float(keep.mean()),
        "planted": float(broken[cosine >= 1 - DISTANCE].mean()),
        "exact": found / max(pairs, 1),
        "exact_pairs": pairs,
    }


def dedup_case(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one way of dropping duplicates at one size."""
    method = {"ours": semdedup, "semhash": semhash, "near_duplicate": near_duplicate}[given.case]
    method(with_copies(2000, given.seed + 1)[0], given)  # libraries are loaded
    vectors, source, cosine = with_copies(given.rows, given.seed)
    (keep, parts), made = once(lambda: method(vectors, given))
    return made | {"parts": parts, "recall": recall(vectors, keep, source, cosine)}


# -- KNN-Shapley -------------------------------------------------------------------------------


def labelled(n: int, rng: np.random.Generator, seed: int) -> tuple[Floats, Ints]:
    """n rows and their labels, one in twenty wrong."""
    vectors, label = Topics(seed).rows(rng, n)
    wrong = rng.random(n) < 0.05
    return vectors, np.where(wrong, rng.integers(0, GROUPS, n), label)


def valued(
    train: tuple[Floats, Ints], asking: tuple[Floats, Ints], threads: int
) -> npt.NDArray[np.float64]:
    """Values of training rows by validation rows, as the step `knn_shapley` finds them."""
    n = len(train[0])
    index = VectorIndex.build(train[0], np.arange(n), kind="flat", threads=threads)
    near, _ = index.search(asking[0], DEPTH, threads=threads)
    return values_of(near, train, asking)


def values_of(
    near: Ints, train: tuple[Floats, Ints], asking: tuple[Floats, Ints]
) -> npt.NDArray[np.float64]:
    """Values from the nearest rows, those beyond taken to be right as often as all others."""
    n, depth = len(train[0]), near.shape[1]
    agree = train[1][near] == asking[1][:, None]
    right = np.bincount(train[1], minlength=GROUPS)[asking[1]] - agree.sum(axis=1)
    return knn_shapley(near, agree, K, n, beyond=right / max(1, n - depth))


def valued_by_each_other(train: tuple[Floats, Ints], threads: int) -> npt.NDArray[np.float64]:
    """Values of rows by each other with depth k, the form of cleanlab."""
    n = len(train[0])
    index = VectorIndex.build(train[0], np.arange(n), kind="flat", threads=threads)
    found, _ = index.search(train[0], K + 1, threads=threads)
    near = found[found != np.arange(n)[:, None]].reshape(n, K)
    return knn_shapley(near, train[1][near] == train[1][:, None], K, n)


def cleanlab(train: tuple[Floats, Ints]) -> npt.NDArray[np.float64]:
    """The same by cleanlab."""
    from cleanlab.data_valuation import data_shapley_knn

    made: npt.NDArray[np.float64] = data_shapley_knn(train[1], features=train[0], k=K)
    return 2 * made - 1


def error_of_depth(train: tuple[Floats, Ints], asking: tuple[Floats, Ints]) -> float:
    """Largest difference from the exact form, in the mean over 20 validation rows."""
    few = asking[0][:20], asking[1][:20]
    order = np.argsort(-(few[0] @ train[0].T), axis=1, kind="stable")
    exact = values_of(order, train, few)
    return float(np.abs(exact - values_of(order[:, :DEPTH], train, few)).max())


def shapley_case(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one way of valuing rows at one size."""
    rng = np.random.default_rng(given.seed + 2)
    small, train = labelled(2000, rng, given.seed), labelled(given.rows, rng, given.seed)
    asking = labelled(VALIDATION, rng, given.seed)
    if given.peers:
        ours = lambda rows: valued_by_each_other(rows, given.threads)  # noqa: E731
        call = {"ours": ours, "cleanlab": cleanlab}[given.case]
        call(small)
        value, made = once(lambda: call(train))
        return made | {"difference": float(np.abs(value - ours(train)).max())}
    valued(small, asking, given.threads)
    _, made = once(lambda: valued(train, asking, given.threads))
    return made | {"error": error_of_depth(train, asking)}


# -- running and writing -----------------------------------------------------------------------


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every size of ours, then the peers and ours at sizes that they can do."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    options = {"part": given.part, "threads": given.threads, "seed": given.seed}
    made = {
        "command": fresh.command(__file__),
        "machine": fresh.machine("cpu", given.threads, PACKAGES),
        **options,
        "ours": {},
        "peers": {},
    }
    runs = [(n, "ours", 0) for n in given.sizes]
    runs += [(n, case, 1) for n in given.peer_sizes for case in PEERS[given.part]]
    for n, case, peers in runs:
        found = fresh.in_child(__file__, case, {**options, "rows": n, "peers": peers})
        (made["peers"].setdefault(str(n), {}) if peers else made["ours"])[
            case if peers else str(n)
        ] = found
        print(f"{n:9d} {case:15s} {json.dumps(found)}", flush=True)
    return made


def cell(found: dict[str, Any]) -> str:
    """Seconds and MiB."""
    if "failed" in found:
        return f"{found['failed'][:80]} | "
    return f"{found['seconds']:.2f} | {found['peak_bytes'] / 2**20:.0f}"


def notes(found: dict[str, Any]) -> str:
    """What a case says beside time and memory."""
    if "recall" in found:
        r = found["recall"]
        return f"{100 * r['kept']:.2f} | {100 * r['planted']:.2f} | {100 * r['exact']:.2f}"
    if "difference" in found:
        return f"{found['difference']:.1e}"
    return f"{found['error']:.5f}" if "error" in found else ""


def section(made: dict[str, Any]) -> str:
    """The tables for RESULTS.md."""
    dedup = made["part"] == "dedup"
    title = "Near-duplicates of embeddings" if dedup else "KNN-Shapley of embeddings"
    about = (
        f"{D} float32 a row. Recall in % of pairs with a cosine from {1 - DISTANCE:g} on:"
        " planted ones, and all of 1,000 rows by exact search."
        if dedup
        else f"{D} float32 a row, {VALIDATION} validation rows, k {K}, depth {DEPTH}; the error"
        " is the largest difference from the exact form for 20 validation rows."
    )
    extra = "| kept % | planted | exact " if dedup else "| largest error "
    lines = fresh.preamble(title, made, about)
    lines += ["", f"| rows | s | peak MiB | s to the size before {extra}|"]
    lines += ["|---:" * (7 if dedup else 5) + "|"]
    before: float | None = None
    for n, found in made["ours"].items():
        seconds = found.get("seconds")
        growth = f"{seconds / before:.2f}" if seconds and before else ""
        lines.append(f"| {int(n):,} | {cell(found)} | {growth} | {notes(found)} |")
        before = seconds
    extra = extra if dedup else "| largest difference "
    lines += ["", f"| rows | | s | peak MiB | times as long as ours {extra}|"]
    lines += ["|---:|---" + "|---:" * (6 if dedup else 4) + "|"]
    for n, cases in made["peers"].items():
        mine = cases["ours"].get("seconds")
        for case, found in cases.items():
            times = f"{found['seconds'] / mine:.1f}" if mine and "seconds" in found else ""
            lines.append(f"| {int(n):,} | {case} | {cell(found)} | {times} | {notes(found)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["dedup", "shapley"], required=True)
    parser.add_argument("--case", help="measure this one alone, here, and print JSON")
    parser.add_argument("--rows", type=int, help="rows of that case")
    parser.add_argument("--peers", type=int, default=0, help="1: that case is compared with peers")
    parser.add_argument("--sizes", type=fresh.sizes, help="rows, commas between")
    parser.add_argument("--peer-sizes", type=fresh.sizes, help="rows for the peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md")
    given = parser.parse_args()
    # A peer takes every processor that it may; give all the same number.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    if given.case:
        print(json.dumps((dedup_case if given.part == "dedup" else shapley_case)(given)))
        return
    given.sizes = given.sizes or fresh.sizes(SIZES[given.part])
    given.peer_sizes = given.peer_sizes or fresh.sizes(PEER_SIZES[given.part])
    made = measure(given)
    fresh.save(given.results, f"dataset_{given.part}", made)
    text = section(made)
    write_section(given.results / "RESULTS.md", f"dataset-{given.part}", text)
    print(text)


if __name__ == "__main__":
    main()
