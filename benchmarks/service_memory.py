"""Memory of the service over 10,000 requests of mixed sizes and routes.

    python benchmarks/service_memory.py [--requests 10000] [--clients 4]

`prunery serve` as it comes, with the shipped model, in a process of its own, asked over HTTP by
several clients at once: mostly requests of 1 to 10 passages of a few sentences; one in fifty of 100
passages, one in fifty with a passage of 50,000 characters, one in twenty refused (a wrong option,
no JSON, past a limit), one in forty left by its client before the answer. Resident memory
is read after every tenth of the requests, once nothing runs. Flat: the last reading is within 5 %
of that after two tenths, by when every length and route was seen.

Writes results/service_memory.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fresh
import httpx
import numpy as np
from sections import write_section
from service_load import Served, resident, running

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "orjson")
FLAT = 0.05
WORDS = [
    "the", "harbour", "was", "painted", "by", "a", "man", "who", "stayed", "for", "week", "in",
    "spring", "and", "left", "no", "letters", "but", "many", "small", "boats", "were", "drawn",
    "on", "walls", "of", "inn", "where", "fishermen", "met", "to", "talk", "about", "weather",
    "or", "price",
]  # fmt: skip


def passage(rng: np.random.Generator, characters: int) -> str:
    """Sentences of random words, no two passages alike."""
    parts: list[str] = []
    size = 0
    while size < characters:
        words = [WORDS[i] for i in rng.integers(len(WORDS), size=int(rng.integers(4, 20)))]
        sentence = f"{' '.join(words).capitalize()} {int(rng.integers(1 << 30))}."
        parts.append(sentence)
        size += len(sentence) + 1
    return " ".join(parts)


def request(number: int, seed: int) -> tuple[str, bytes, float | None]:
    """Path, body, and after how many seconds the client leaves (None: it stays)."""
    rng = np.random.default_rng([seed, number])
    kind = rng.random()
    count, size = int(rng.integers(1, 11)), int(rng.integers(40, 800))
    if kind < 0.02:
        count, size = 100, 100
    elif kind < 0.04:
        count, size = 1, 50_000
    passages = [passage(rng, size) for _ in range(count)]
    question = f"who painted number {number}"
    path = ("/v1/prune", "/v1/prune", "/rerank", "/v1/rerank", "/v2/rerank")[number % 5]
    if path == "/v1/prune":
        body: dict[str, Any] = {"question": question, "passages": passages}
    else:
        body = {"query": question, "texts" if path == "/rerank" else "documents": passages}
        if path != "/rerank":
            body["model"] = "default"
    leaves = 0.002 if 0.04 <= kind < 0.065 else None
    if kind > 0.95:
        wrong = (b"[" * 5000, b'{"question": 1}', b'{"passages": [' + b'"a",' * 5000 + b'"a"]}')
        return path, wrong[number % 3], None
    return path, json.dumps(body).encode(), leaves


def ask(url: str, first: int, last: int, clients: int, seed: int) -> dict[str, int]:
    """Requests `first` to `last` by several clients; how many got which answer."""
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def client(place: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as opened:
            for number in range(first + place, last, clients):
                path, body, leaves = request(number, seed)
                said = "left"
                with contextlib.suppress(httpx.TimeoutException):
                    timeout = httpx.Timeout(120, read=leaves or 120)
                    headers = {"Content-Type": "application/json"}
                    answer = opened.post(path, content=body, headers=headers, timeout=timeout)
                    said = str(answer.status_code)
                with lock:
                    counts[said] = counts.get(said, 0) + 1

    threads = [threading.Thread(target=client, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def measure(total: int, clients: int, seed: int) -> dict[str, Any]:
    """Resident bytes after every tenth."""
    command = [sys.executable, "-m", "prunery.cli", "serve", "--port", "PORT"]
    served = Served("prunery serve", command, "/v1/prune", "prune")
    readings, counts = [], {}
    began = time.perf_counter()
    with running(served, 2) as (url, pid):
        readings.append({"requests": 0, "bytes": resident(pid)})
        for tenth in range(10):
            first, last = total * tenth // 10, total * (tenth + 1) // 10
            for said, count in ask(url, first, last, clients, seed).items():
                counts[said] = counts.get(said, 0) + count
            time.sleep(1.0)
            readings.append({"requests": last, "bytes": resident(pid)})
    growth = readings[-1]["bytes"] / readings[2]["bytes"] - 1
    return {
        "readings": readings,
        "answers": dict(sorted(counts.items())),
        "growth": growth,
        "flat": growth < FLAT,
        "seconds": time.perf_counter() - began,
    }


def section(made: dict[str, Any]) -> str:
    """The part of RESULTS.md."""
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    answers = ", ".join(f"{said}: {count}" for said, count in made["answers"].items())
    verdict = "flat" if made["flat"] else "NOT flat"
    last = made["readings"][-1]["requests"] - made["readings"][2]["requests"]
    lines = [
        "## Memory of the service",
        "",
        f"`{made['command']}`",
        "",
        f"{where['processor']}, {where['logical_cores']} cores, Python {where['python']},"
        f" {versions}. Seed {made['seed']}. {made['clients']} clients, {made['seconds']:.0f} s."
        f" Answers by status (left: the client went before it) {answers}.",
        "",
        f"Over the last {last:,} requests resident memory changed by {100 * made['growth']:+.1f} %:"
        f" {verdict} (bound {100 * FLAT:g} %).",
        "",
        "| requests | resident, MiB |",
        "|---|---|",
    ]
    lines += [f"| {one['requests']:,} | {one['bytes'] / 2**20:.0f} |" for one in made["readings"]]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    made: dict[str, Any] = {
        "command": fresh.command(__file__),
        "machine": fresh.machine("cpu", 2, PACKAGES),
        "seed": options.seed,
        "clients": options.clients,
        **measure(options.requests, options.clients, options.seed),
    }
    results = options.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "service_memory.json").write_text(json.dumps(made, indent=1) + "\n")
    write_section(options.out / "RESULTS.md", "service_memory", section(made))
    print(section(made))


if __name__ == "__main__":
    main()
