"""Speed and peak memory of a model's folder, in a process that does nothing else.

    python -m prunery.pipelines.compression.measure_process FOLDER OUT.json

Memory is what the system counts for the process (`VmHWM`; on a GPU the allocator's peak), with
what the libraries take noted beside it. The time is the median of repeats after a first run,
in which packed weights are unpacked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError


@dataclass(frozen=True, slots=True)
class Speed:
    """What a process measured.

    Attributes
    ----------
    prefill, decode
        Tokens a second: of reading a prompt, and of writing one token after another greedily
        (None for a model that does not write).
    peak_memory, base_memory
        Bytes: the process's peak, and what it took before the model was loaded. On a GPU those
        of its memory.
    """

    prefill: float
    decode: float | None
    peak_memory: int
    base_memory: int


def measure(
    folder: Path,
    *,
    prompt: int = 128,
    new: int = 32,
    repeats: int = 3,
    device: str = "cpu",
    threads: int | None = None,
) -> Speed:
    """Run a model's folder in a fresh process and read what it measured.

    Raises ModelError with the process's last words where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="prunery-measure-") as place:
        out = Path(place, "speed.json")
        words = [sys.executable, "-m", __name__, str(folder), str(out)]
        words += [f"--prompt={prompt}", f"--new={new}", f"--repeats={repeats}"]
        words += [f"--device={device}"]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        if threads is not None:
            env["OMP_NUM_THREADS"] = str(threads)
            words.append(f"--threads={threads}")
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        if done.returncode or not out.is_file():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise ModelError(
                f"{folder}: expected to run the model in a process of its own; it ended with"
                f" {last[0]}. Free memory, or set `speed: false`."
            )
        return Speed(**json.loads(out.read_text()))


def main(words: list[str]) -> None:
    """Measure in this process and write JSON."""
    asked = argparse.ArgumentParser()
    asked.add_argument("folder", type=Path)
    asked.add_argument("out", type=Path)
    asked.add_argument("--prompt", type=int, default=128)
    asked.add_argument("--new", type=int, default=32)
    asked.add_argument("--repeats", type=int, default=3)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--threads", type=int)
    given = asked.parse_args(words)
    import torch

    from .quality import load_packed

    if given.threads:
        torch.set_num_threads(given.threads)
    cuda = given.device.startswith("cuda")
    _warm_up(given.folder, given.device)
    base = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    model = load_packed(given.folder, given.device)
    prefill, decode = _times(model, given.prompt, given.new, given.repeats)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    given.out.write_text(json.dumps(asdict(Speed(prefill, decode, peak, base))))


def _warm_up(folder: Path, device: str) -> None:
    """Take what the libraries take at their first use, before memory is noted."""
    import torch

    from ...pruners.models.streamed_model import read_config
    from .packed_codes import linear_modules

    linear_modules(read_config(folder))  # the architecture's code; no weights are made
    (torch.zeros(64, 64, device=device) @ torch.zeros(64, 64, device=device)).sum().item()


def _times(model: Any, prompt: int, new: int, repeats: int) -> tuple[float, float | None]:
    """Tokens a second of prefill and of decoding, medians."""
    import torch

    config = model.config
    most = getattr(config, "max_position_embeddings", None) or prompt + new
    new = min(new, max(1, most // 4))
    prompt = min(prompt, most - new)
    ids = (torch.arange(prompt) % max(1, config.vocab_size - 3) + 3)[None] % config.vocab_size
    ids = ids.to(model.device)
    writes = model.can_generate()
    read = _seconds(lambda: model(ids), repeats)
    if not writes:
        return prompt / read, None

    def write() -> None:
        made = model(ids, use_cache=True)
        for _ in range(new):
            token = made.logits[:, -1:].argmax(-1)
            made = model(token, past_key_values=made.past_key_values, use_cache=True)

    whole = _seconds(write, repeats)
    return prompt / read, new / max(whole - read, 1e-9)


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    import torch

    taken = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:  # the first one warms up
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def resident(line: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest so far) of this process in bytes.

    Elsewhere than on Linux the highest of its life. There it will not do: a process takes over
    its parent's when it is started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for found in status.read_text().splitlines():
            if found.startswith(f"{line}:"):
                return int(found.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
