"""Time and peak memory of one case in a process of its own, and the machine it ran on.

A benchmark's script calls itself: with `--case name` it builds the inputs, runs the case and
prints one line of JSON. Memory is the growth of the process's peak above what the inputs and the
loaded libraries take; allocators keep what they once took, hence the fresh process.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")


def measure(call: Callable[[], Any], repeats: int, device: str) -> dict[str, Any]:
    """Peak bytes of the first `call` beyond those in use, and seconds of `repeats` more."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    call()
    if cuda:
        torch.cuda.synchronize()
    after = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return {"peak_bytes": after - before, "seconds": taken}


def resident(line: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest since `forget_peak`) of this process in bytes.

    Linux alone. `ru_maxrss` will not do: a process takes over its parent's when it is started.
    """
    for found in Path("/proc/self/status").read_text().splitlines():
        if found.startswith(f"{line}:"):
            return int(found.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {line}; memory cannot be measured here.")


def forget_peak() -> None:
    """Let `VmHWM` begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_child(script: str, case: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run `script --case case` with the options; what it printed last, or {"failed": why}."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, script, "--case", case, *words], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def cells(made: dict[str, Any], base: float | None) -> str:
    """Table cells of a case: milliseconds, spread, times as fast as `base`, MiB."""
    if "failed" in made:
        return f"{made['failed'][:80]} | | | "
    taken = made["seconds"]
    middle = statistics.median(taken)
    times = f"{base / middle:.2f}" if base else ""
    return (
        f"{1000 * middle:.1f} | {1000 * min(taken):.1f} to {1000 * max(taken):.1f} | {times} |"
        f" {made['peak_bytes'] / 2**20:.1f}"
    )


def median(made: dict[str, Any]) -> float | None:
    """Median seconds, or None where the case failed."""
    return None if "failed" in made else statistics.median(made["seconds"])


def machine(device: str, threads: int, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Processor or GPU, threads and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "logical_cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def preamble(title: str, made: dict[str, Any], about: str) -> list[str]:
    """First lines of a section."""
    where = made["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return [
        f"## {title}",
        "",
        f"`{made['command']}`",
        "",
        f"{where['gpu'] or where['processor']}, {where['threads']} threads, Python"
        f" {where['python']}, {versions}. Load average at the start {where['load_before']:.1f}."
        f" Seed {made['seed']}. Each case in a process of its own; peak memory is what the case"
        f" adds to inputs and libraries. {about}",
    ]


def command(script: str) -> str:
    """The command line as a reader would type it."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])


def save(folder: Path, name: str, made: dict[str, Any]) -> None:
    """Write `results/name.json`."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    path = folder / "results" / f"{name}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def sizes(text: str) -> Sequence[int]:
    """Whole numbers with commas between them."""
    return [int(one) for one in text.split(",")]
