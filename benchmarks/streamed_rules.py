"""Time and memory of rules over scores streamed from a store's Parquet.

    python benchmarks/streamed_rules.py                         100,000,000 scores
    python benchmarks/streamed_rules.py --rows 2000000          the same, small

One table of `--rows` rows in 32 shards is written to a store in a temporary folder: ids that look
random, scores of a normal distribution, one in ten of them exactly 0. Sizes below the whole are
its first shards. Cases, each in a process of its own:

- `top_fraction`, `ccs`: find the border and decide about every row, nothing written; 30 % kept.
- `top_fraction in memory`, `ccs in memory`: `pruners.rules.top_fraction` and `pruners.sample.ccs`
  over arrays read from the same table, at the smallest size; the digest of the kept rows must be
  that of the streamed rule.
- `step`: `prune_scores` with ccs over all rows, its decisions written to the store.

Memory is the whole process's peak of resident memory, libraries and all. Disk: about 27 bytes a
row (2.7 GB), freed at the end. Writes `results/streamed_rules.json` and a section of `RESULTS.md`
beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pyarrow as pa
from sections import write_section

from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.pipelines.streamed import ccs_streamed, top_fraction_streamed
from prunery.pruners import rules
from prunery.pruners.contract import Signals
from prunery.pruners.sample.ccs import Ccs
from prunery.storage import Store, Table, schemas

HERE = Path(__file__).resolve().parent
SHARDS = 32
SIZES = (4, 8, 16, 32)  # in shards
BATCH = 1 << 17
KEEP = 0.3
SCHEMA = pa.schema([schemas.id_field(), pa.field("score", pa.float32(), nullable=False)])
Arrays = tuple[Any, Any]


def write(store: Store, rows: int, seed: int) -> None:
    """The table of scores."""
    size = rows // SHARDS
    with store.write(name="scores", step="import_scores", schema=SCHEMA) as writer:
        for shard in writer.pending(SHARDS):
            draw = np.random.default_rng([seed, shard])
            with writer.shard(shard) as out:
                for start in range(0, size, BATCH):
                    count = min(BATCH, size - start)
                    number = shard * size + start + np.arange(count, dtype=np.uint64)
                    ids = (rules.mix(number) >> np.uint64(1)).astype(np.int64)
                    scores = draw.standard_normal(count, dtype=np.float32)
                    scores[draw.random(count) < 0.1] = 0.0
                    out.write(pa.table([ids, scores], schema=SCHEMA))
        writer.commit()


def batches(table: Table, shards: int) -> Iterator[Arrays]:
    """(ids, scores) of the first shards."""
    for shard in range(shards):
        for batch in table.shard_batches(shard, ["id", "score"], BATCH):
            yield batch.column("id").to_numpy(), batch.column("score").to_numpy()


def streamed(table: Table, method: str, shards: int) -> dict[str, Any]:
    """Find the border, then decide about all rows."""
    start = time.perf_counter()
    if method == "ccs":
        rule: Any = ccs_streamed(lambda: batches(table, shards), KEEP, seed=0)
    else:
        rule = top_fraction_streamed(lambda: batches(table, shards), KEEP)
    found = time.perf_counter() - start
    kept, digest = 0, hashlib.sha256()
    for ids, scores in batches(table, shards):
        mask = rule.decide(ids, scores).keep
        kept += int(mask.sum())
        digest.update(mask.tobytes())
    return {
        "border_seconds": found,
        "kept": kept,
        "expected": rule.kept,
        "mask": digest.hexdigest(),
    }


def in_memory(table: Table, method: str, shards: int) -> dict[str, Any]:
    """The same with every row in arrays."""
    ids, scores = map(np.concatenate, zip(*batches(table, shards), strict=True))
    if method == "ccs":
        mask = Ccs(keep=KEEP)(Signals({"id": ids, "difficulty": scores}), seed=0).keep
    else:
        mask, _ = rules.top_fraction(scores, ids, KEEP)
    return {"kept": int(mask.sum()), "mask": hashlib.sha256(mask.tobytes()).hexdigest()}


def step(store: Store) -> dict[str, Any]:
    """The step, decisions written."""
    spec = STEPS["prune_scores"]
    options = spec.options(method="ccs", keep=KEEP)
    made = spec(options, {"scores": "scores"}, StepContext(store, name="decision"))
    return {"kept": made.kept, "bytes": made.bytes}


def child(given: argparse.Namespace) -> None:
    """Measure one case and print it."""
    store = Store(given.store)
    fresh.forget_peak()
    start = time.perf_counter()
    if given.case == "write":
        write(store, given.rows, given.seed)
        made: dict[str, Any] = {"bytes": store.manifest("scores").bytes}
    elif given.case == "step":
        made = step(store)
    else:
        method, _, where = given.case.partition(" ")
        run = in_memory if where else streamed
        made = run(store.table("scores"), method, given.shards)
    made |= {"seconds": [time.perf_counter() - start], "peak_bytes": fresh.resident("VmHWM")}
    print(json.dumps(made))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All cases over one table, which goes in the end."""
    folder = tempfile.mkdtemp(dir=given.folder)
    options = {"store": f"{folder}/store", "seed": given.seed, "rows": given.rows}
    size = given.rows // SHARDS
    cases = [("write", SHARDS), *((f"{m} in memory", SIZES[0]) for m in ("top_fraction", "ccs"))]
    cases += [(method, shards) for shards in SIZES for method in ("top_fraction", "ccs")]
    found: dict[str, Any] = {}
    try:
        for case, shards in [*cases, ("step", SHARDS)]:
            made = fresh.in_child(__file__, case, {**options, "shards": shards})
            found[f"{case} {shards * size}"] = {**made, "rows": shards * size, "case": case}
            print(f"{case:24s} {shards * size:11d} {fresh.cells(made, None)}", flush=True)
            if "failed" in made:
                raise SystemExit(f"{case} failed: {made['failed']}")
    finally:
        shutil.rmtree(folder)
    check(found, SIZES[0] * size)
    return found


def check(found: dict[str, Any], smallest: int) -> None:
    """The same rows as in memory, and exactly as many as asked for."""
    for method in ("top_fraction", "ccs"):
        pair = [found[f"{name} {smallest}"] for name in (method, f"{method} in memory")]
        if pair[0]["mask"] != pair[1]["mask"]:
            raise SystemExit(f"{method}: other rows than in memory")
    for made in found.values():
        if "kept" in made and made["kept"] != rules.count_of(made["rows"], KEEP):
            raise SystemExit(f"{made['case']}: kept {made['kept']} of {made['rows']}")


def section(made: dict[str, Any]) -> str:
    """The part of RESULTS.md."""
    about = (
        f"{KEEP:.0%} of the rows kept. The kept rows are the same as in memory, compared at the"
        " smallest size. Here peak memory is the whole process's, libraries and all."
    )
    lines = [
        *fresh.preamble("Rules over streamed scores", made, about),
        "",
        "| case | rows | seconds | of it finding the border | million rows a second | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in made["cases"].values():
        seconds = one["seconds"][0]
        border = f"{one['border_seconds']:.1f}" if "border_seconds" in one else ""
        lines.append(
            f"| {one['case']} | {one['rows']:,} | {seconds:.1f} | {border} |"
            f" {one['rows'] / seconds / 1e6:.2f} | {one['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or run one case."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the store lies meanwhile")
    parser.add_argument("--dry", action="store_true", help="write no results")
    for name in ("--case", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        child(given)
        return
    given.rows -= given.rows % SHARDS
    made = {
        "command": fresh.command(__file__),
        "seed": given.seed,
        "machine": fresh.machine("cpu", 1),
        "cases": measure(given),
    }
    if not given.dry:
        fresh.save(HERE, "streamed_rules", made)
        write_section(HERE / "RESULTS.md", "streamed_rules", section(made))


if __name__ == "__main__":
    main()
