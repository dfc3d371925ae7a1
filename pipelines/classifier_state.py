"""States of a classifier's training under the cache, so that a killed run goes on from them.

One file a run of a table's key, replaced whole after every epoch. It spares work and decides
nothing: without it, or with a damaged one, the run is trained again to the same rows.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def state_file(key: str, run: int) -> Path:
    """Where the state of a run of the table with that key lies."""
    home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
    return Path(home, "classifiers", key[:32], f"run-{run}.safetensors")


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Replace the state by another one, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, made)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Tensor] | None:
    """The state, or None where there is none that can be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def forget_states(key: str) -> None:
    """Remove the states of a table that is finished."""
    shutil.rmtree(state_file(key, 0).parent, ignore_errors=True)
