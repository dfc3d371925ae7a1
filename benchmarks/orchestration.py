"""What orchestration and storage cost beside the work, by engine; and a flow of 2,000 shards.

    python benchmarks/orchestration.py [--engines plain,processes,prefect,ray] [--shards 100]

The work is real and costs no processor: each shard of `label_silver` asks a server of this process
one question, and the answer takes a second. So 100 shards are 100 s of work, 50 s for two workers;
what a run takes beyond that, from the first shard's start to the commit, is the cost. The start
of an engine (interpreters, a Prefect server, a Ray cluster) stands apart: it does not grow with
the work. The long flow chunks a file cut into 2,000 shards, under Prefect.

Writes results/orchestration.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prunery.pipelines.recipe import Recipe, parse_recipe
from prunery.pipelines.run import RunResult, run_recipe
from prunery.pipelines.workers import Workers
from prunery.storage import Store

from sections import write_section  # isort: skip

HERE = Path(__file__).parent
SECONDS = 1.0
RUNS = {
    "plain": Workers(),
    "processes": Workers("processes", 2),
    "prefect": Workers("processes", 2),
    "ray": Workers("ray", 2),
}
SILVER = """
name: seconds
steps:
  silver:
    step: label_silver
    rows: ["{rows}"]
    shard_rows: 1
    endpoint: {{base_url: "{url}", model: m}}
"""
CHUNKS = """
name: many-shards
steps:
  chunks: {{step: chunk, path: "{rows}", max_tokens: 32, shard_bytes: {size}}}
"""


class Server:
    """Answers each chat after a second, and remembers when the first came."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.asked = 0
        self._lock = threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL."""
        server = self
        message = {"role": "assistant", "content": "In May [2]."}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        body = json.dumps({"id": "x", "choices": choices, "usage": usage}).encode()

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                with server._lock:
                    server.first = server.first or time.perf_counter()
                    server.asked += 1
                time.sleep(SECONDS)
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{made.server_port}/v1"
        finally:
            made.shutdown()


class Times:
    """When each shard was done, and the table committed."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.committed = 0.0

    def start(self, name: str, total: int) -> None:
        """Not looked at."""

    def advance(self, n: int = 1) -> None:
        """A shard is done."""
        self.at += [time.perf_counter()] * n

    def finish(self) -> None:
        """The table is committed."""
        self.committed = time.perf_counter()


def run(recipe: Recipe, folder: Path, engine: str, progress: Times) -> RunResult:
    """Run a recipe on one of the engines."""
    if engine == "prefect":
        from prunery.flows.run import run_flow

        return run_flow(recipe, Store(folder), workers=RUNS[engine], progress=progress)
    return run_recipe(recipe, Store(folder), workers=RUNS[engine], progress=progress)


def of_seconds(engine: str, shards: int, folder: Path) -> dict[str, Any]:
    """One run over so many shards of a second."""
    rows = folder / "rows.jsonl"
    text = "Ann met Bob. Bob left in May."
    borders = [[0, 13], [13, len(text)]]
    rows.write_text(
        "".join(
            json.dumps({"question": f"When, {i}?", "passage": text, "sentences": borders}) + "\n"
            for i in range(shards)
        )
    )
    server, times, load = Server(), Times(), os.getloadavg()[0]
    with server.serving() as url:
        recipe = parse_recipe(SILVER.format(rows=rows, url=url))
        began = time.perf_counter()
        result = run(recipe, folder / engine, engine, times)
        end = time.perf_counter()
    assert server.asked == shards == result.manifests["silver"].rows
    assert server.first is not None
    work = shards * SECONDS / RUNS[engine].count
    took = times.committed - server.first
    return {
        "shards": shards,
        "workers": RUNS[engine].count,
        "work_seconds": round(work, 2),
        "seconds": round(took, 3),
        "overhead": round(took / work - 1, 4),
        "start_seconds": round(server.first - began, 2),
        "whole_seconds": round(end - began, 2),
        "load": round(load, 1),
    }


def many_shards(shards: int, folder: Path) -> dict[str, Any]:
    """Seconds a shard, of the first and the last quarter of a flow over many shards."""
    rows = folder / "many.jsonl"
    line = '{{"text": "Row {:06d} speaks of things. It ends here, as rows do.", "title": "t"}}\n'
    rows.write_text("".join(line.format(i) for i in range(4 * shards)))
    size = rows.stat().st_size // shards
    times = Times()
    result = run(
        parse_recipe(CHUNKS.format(rows=rows, size=size)), folder / "many", "prefect", times
    )
    gaps = [b - a for a, b in zip(times.at, times.at[1:], strict=False)]
    part = len(gaps) // 4
    first, last = gaps[1:part], gaps[-part:]
    return {
        "shards": len(result.manifests["chunks"].parts),
        "first_ms": round(1000 * statistics.mean(first), 2),
        "last_ms": round(1000 * statistics.mean(last), 2),
        "first_median_ms": round(1000 * statistics.median(first), 2),
        "last_median_ms": round(1000 * statistics.median(last), 2),
    }


def section(found: dict[str, Any]) -> str:
    """The Markdown of the results."""
    lines = [
        "## Orchestration and storage",
        "",
        "`python benchmarks/orchestration.py`: shards of `label_silver`, each of which waits one"
        " second for its answer; cost is what the run took beyond the waiting, storage included,"
        " from the first shard on. The start of an engine stands apart.",
        "",
        "| engine | workers | shards | work, s | run, s | cost | start, s | load average |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {r['workers']} | {r['shards']} | {r['work_seconds']:g} | {r['seconds']:.2f} |"
        f" {r['overhead']:.1%} | {r['start_seconds']:.1f} |"
        f" {r['load']:g} |"
        for name, r in found["engines"].items()
    ]
    many = found.get("many_shards")
    if many:
        lines += [
            "",
            f"A flow over {many['shards']:,} shards under Prefect (chunks of a file, two"
            f" processes): a shard every {many['first_ms']:.1f} ms in the first quarter and every"
            f" {many['last_ms']:.1f} ms in the last (medians {many['first_median_ms']:.1f} and"
            f" {many['last_median_ms']:.1f}).",
        ]
    lines += [
        "",
        f"{found['cores']} cores. The load average is that of all other work on the machine at the"
        " start of the run: a shard that waits for a core costs more than one that finds it free.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--engines", default=",".join(RUNS))
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--many", type=int, default=2000)
    given = parser.parse_args()
    out = HERE / "results" / "orchestration.json"
    found = json.loads(out.read_text()) if out.is_file() else {"engines": {}}
    found |= {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        for engine in filter(None, given.engines.split(",")):
            found["engines"][engine] = of_seconds(engine, given.shards, Path(folder))
            print(engine, found["engines"][engine], flush=True)
            write(out, found)
        if given.many:
            found["many_shards"] = many_shards(given.many, Path(folder))
            print(found["many_shards"], flush=True)
            write(out, found)


def write(out: Path, found: dict[str, Any]) -> None:
    """The results so far."""
    out.write_text(json.dumps(found, indent=1) + "\n")
    write_section(HERE / "RESULTS.md", "orchestration", section(found))


if __name__ == "__main__":
    main()
