"""Throughput and latency against rate: ours, a plain service, infinity-emb; one encoder, one run.

    python benchmarks/service_load.py --data ../shared/data --infinity PATH/TO/python

An open loop: requests come at random times (Poisson) at a set rate whether or not earlier ones
were answered, and latency counts from the moment a request was due. Each holds a question of
derived_nq_multidoc with 2, 5, 10 or 20 of its passages (drawn with the seed, the same requests in
the same order for every service), each passage cut at 1,500 characters: in one window, so that
all services read the same tokens (past 512 ours would read on, the others cut). A rate is kept up
for `--seconds`; rates rise by `--step` from `--first` (ours begins two or three steps later) until
the 95th percentile passes `--limit` seconds or requests fail. What a service is said to carry is
the highest rate whose p95 stayed within `--target` seconds, all requests answered.

Services: `prunery serve` as it comes (bfloat16 where the processor multiplies it), the same in
float32, both asked at /rerank and once more at /v1/prune with sentences decided and returned;
`service_plain.py`; and, with `--infinity` naming the interpreter of an environment with
`pip install 'infinity-emb[server,torch]'`, infinity_emb's own server. All load the same weights
(the default checkpoint's encoder and ranking head, written as a BERT sequence classifier for the
last two). Writes `results/service_load.json`, a plot and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh
import httpx
import numpy as np
from context import cross_encoder, load
from sections import write_section
from standalone_svg import standalone

from prunery.pipelines.svg import Series, line_chart
from prunery.pruners.models.provence import load_provence

HERE = Path(__file__).resolve().parent
SIZES, SHARES = (2, 5, 10, 20), (0.3, 0.3, 0.25, 0.15)
CHARACTERS = 1500
AHEAD = 3  # steps of the rate that ours is known to carry
PACKAGES = ("torch", "transformers", "sentence-transformers", "fastapi", "uvicorn")


@dataclass(frozen=True)
class Served:
    """How to start one service and how to ask it; `ahead` steps of the rate are left out."""

    name: str
    command: Sequence[str]
    path: str
    kind: str
    ahead: int = 0


def body(kind: str, question: str, passages: list[str]) -> bytes:
    """One request in the words of a service."""
    if kind == "prune":
        made: dict[str, Any] = {"question": question, "passages": passages}
    elif kind == "infinity":
        made = {"query": question, "documents": passages, "model": "model"}
    else:
        made = {"query": question, "texts": passages}
    return json.dumps(made).encode()


def requests(data: Path, count: int, seed: int) -> list[tuple[str, list[str]]]:
    """So many questions, each with its share of passages."""
    questions, passages = load(data, 400, max(SIZES))
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        which = int(rng.integers(len(questions)))
        size = int(rng.choice(SIZES, p=SHARES))
        # No two requests alike, so that nothing can be answered from a cache.
        texts = [text[:CHARACTERS].rpartition(" ")[0] for text in passages[which][:size]]
        made.append((f"{questions[which]} ({number})", texts))
    return made


async def offered(
    url: str, bodies: Sequence[bytes], rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Latencies of requests that come at `rate` a second for so long."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 2) + 10)
    due = np.cumsum(gaps)
    due = due[due < seconds]
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    taken: list[float] = []
    failed: dict[str, int] = {}
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        start = time.perf_counter()

        async def one(number: int) -> None:
            await asyncio.sleep(max(0.0, due[number] - (time.perf_counter() - start)))
            try:
                answer = await client.post(
                    url,
                    content=bodies[number % len(bodies)],
                    headers={"content-type": "application/json"},
                )
                if answer.status_code == 200:
                    taken.append(time.perf_counter() - start - due[number])
                    return
                what = str(answer.status_code)
            except httpx.HTTPError as error:
                what = type(error).__name__
            failed[what] = failed.get(what, 0) + 1

        await asyncio.gather(*(one(number) for number in range(len(due))))
        whole = time.perf_counter() - start
    found = np.percentile(taken, [50, 95, 99]).tolist() if taken else [float("nan")] * 3
    return {
        "rate": rate,
        "offered": len(due),
        "answered": len(taken),
        "failed": failed,
        "throughput": len(taken) / whole,
        "p50": found[0],
        "p95": found[1],
        "p99": found[2],
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(served: Served, threads: int) -> Iterator[tuple[str, int]]:
    """Base URL and process id of a started service that answers."""
    port = free_port()
    command = [word.replace("PORT", str(port)) for word in served.command]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }
    log = tempfile.TemporaryFile()  # noqa: SIM115  closed when the service is
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        health = "/health" if served.kind == "infinity" else "/readyz"
        for _ in range(600):
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{served.name} ended: {log.read()[-800:].decode()}")
            try:
                if httpx.get(url + health, timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def resident(pid: int) -> int:
    """Bytes of memory of a process and its children now."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
        except (OSError, ValueError):
            continue
        if pid in (int(folder.name), int(lines["PPid"])):
            total += int(lines.get("VmRSS", "0 kB").split()[0]) * 1024
    return total


def climb(served: Served, asked: Sequence[tuple[str, list[str]]], options: Any) -> dict[str, Any]:
    """One service under rising rates."""
    bodies = [body(served.kind, question, passages) for question, passages in asked]
    steps: list[dict[str, Any]] = []
    with running(served, options.threads) as (url, pid):
        asyncio.run(offered(url + served.path, bodies, 2.0, 10.0, options.seed))  # warm
        before, rate = resident(pid), options.first * options.step**served.ahead
        while True:
            step = asyncio.run(
                offered(url + served.path, bodies, rate, options.seconds, options.seed)
            )
            steps.append(step)
            print(f"{served.name:28} {json.dumps(step)}", flush=True)
            if step["failed"] or not step["p95"] <= options.limit:
                break
            rate *= options.step
        after = resident(pid)
    return {
        "name": served.name,
        "steps": steps,
        "memory_before": before,
        "memory_after": after,
        "requests": sum(step["answered"] for step in steps),
    }


def carried(steps: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """The most answered a second within the target, and its p95; None for both where none was."""
    held = [step for step in steps if step["p95"] <= target and not step["failed"]]
    best = max(held, key=lambda step: step["throughput"], default=None)
    return {
        "carried": None if best is None else best["throughput"],
        "carried_p95": None if best is None else best["p95"],
    }


def services(folder: str, infinity: str | None) -> list[Served]:
    """Those that can be started here."""
    ours = [sys.executable, "-m", "prunery.cli", "serve", "--port", "PORT"]
    plain = [sys.executable, str(HERE / "service_plain.py"), folder, "PORT"]
    made = [
        Served("Prunery, /rerank", ours, "/rerank", "tei", AHEAD),
        Served("Prunery, /v1/prune", ours, "/v1/prune", "prune", AHEAD),
        Served("Prunery float32, /rerank", [*ours, "--dtype", "float32"], "/rerank", "tei", 2),
        Served("plain CrossEncoder", plain, "/rerank", "tei"),
    ]
    if infinity:
        command = str(Path(infinity).parent / "infinity_emb")
        words = f"v2 --model-id {folder} --served-model-name model --host 127.0.0.1 --port PORT"
        more = ["--device", "cpu", "--engine", "torch", "--no-bettertransformer"]
        made.append(Served("infinity-emb", [command, *words.split(), *more], "/rerank", "infinity"))
    return made


def section(made: dict[str, Any]) -> str:
    """The part of RESULTS.md."""
    about = (
        f"Open loop, {made['seconds']:g} s a rate, requests of {', '.join(map(str, SIZES))}"
        f" passages, generator on the same machine."
    )
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "## The service under load",
        "",
        f"`{made['command']}`",
        "",
        f"{where['processor']}, {where['logical_cores']} cores, {where['threads']} threads, Python"
        f" {where['python']}, {versions}. Seed {made['seed']}. {about}",
        "",
        f"| service | carried at p95 <= {made['target']:g} s, requests/s | its p95, s |"
        " against the plain service | memory before and after, MiB | requests |",
        "|---|---|---|---|---|---|",
    ]
    base = next(
        (one["carried"] for one in made["services"] if one["name"].startswith("plain")), None
    )
    for one in made["services"]:
        if one.get("carried") is None:
            lines.append(f"| {one['name']} | none | | | | |")
            continue
        ratio = f"{one['carried'] / base:.2f}" if base else ""
        lines.append(
            f"| {one['name']} | {one['carried']:.1f} | {one['carried_p95']:.3f} | {ratio} |"
            f" {one['memory_before'] / 2**20:.0f}, {one['memory_after'] / 2**20:.0f} |"
            f" {one['requests']} |"
        )
    lines += [
        "",
        "| service | rate offered | answered a second | p50, s | p95, s | p99, s | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in made["services"]:
        lines += [
            f"| {one['name']} | {step['rate']:.1f} | {step['throughput']:.1f} | {step['p50']:.3f} |"
            f" {step['p95']:.3f} | {step['p99']:.3f} | {sum(step['failed'].values())} |"
            for step in one["steps"]
        ]
    lines += ["", "![p95 against rate](results/service_load.svg)"]
    return "\n".join(lines)


def plot(made: dict[str, Any]) -> str:
    """p95 against the rate offered, one line a service."""
    series = [
        Series(one["name"], [(step["rate"], step["p95"]) for step in one["steps"]], slot)
        for slot, one in enumerate(made["services"])
    ]
    rates = [step["rate"] for one in made["services"] for step in one["steps"]]
    chart = line_chart(
        series,
        x_label="requests a second offered",
        y_label="p95, seconds",
        label="95th percentile of the latency against the rate offered, one line a service",
        x_range=(0.0, max(rates)),
        y_range=(0.0, made["target"] * 3),
        percent_x=False,
        percent_y=False,
    )
    return standalone(chart, [one["name"] for one in made["services"]])


def main() -> None:
    """Measure all services and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--infinity", help="interpreter of an environment with infinity-emb")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=float, default=1.0, help="first rate, requests a second")
    parser.add_argument("--step", type=float, default=1.35)
    parser.add_argument("--target", type=float, default=3.0, help="seconds of p95")
    parser.add_argument("--limit", type=float, default=3.0, help="p95 at which to stop, seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="services whose name holds this, anew")
    options = parser.parse_args()
    asked = requests(options.data, 2000, options.seed)
    machine = fresh.machine("cpu", options.threads, PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        if cross_encoder(load_provence("default", device="cpu", dtype="float32"), folder) is None:
            sys.exit("the default checkpoint is no BERT with a tanh pooler; nothing was measured.")
        made: dict[str, Any] = {
            "command": "python benchmarks/service_load.py"
            + (" --infinity PYTHON" if options.infinity else ""),
            "machine": machine,
            "seed": options.seed,
            "seconds": options.seconds,
            "target": options.target,
            "services": [
                climb(served, asked, options)
                for served in services(folder, options.infinity)
                if not options.only or options.only in served.name
            ],
        }
    if options.only:
        before = json.loads((HERE / "results" / "service_load.json").read_text())
        new = {one["name"]: one for one in made["services"]}
        made["services"] = [new.get(one["name"], one) for one in before["services"]]
        made["command"] = before["command"]
    made["services"] = [one | carried(one["steps"], options.target) for one in made["services"]]
    fresh.save(HERE, "service_load", made)
    (HERE / "results" / "service_load.svg").write_text(plot(made), encoding="utf-8")
    write_section(HERE / "RESULTS.md", "service-load", section(made))


if __name__ == "__main__":
    main()
