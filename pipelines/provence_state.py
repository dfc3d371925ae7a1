"""Checkpoints of a training run: written whole or not at all, resumed to the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import InputError, ModelError

PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: optimiser steps done, the epoch, batches done in it, and the digest of
    the options and rows that it belongs to."""

    step: int
    epoch: int
    batch: int
    digest: str


def save_state(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
) -> Path:
    """Write `step-N` under a folder, then remove older ones. No randomness needs storing: what a
    step draws is a function of (seed, epoch) or (seed, step)."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing.", dir=folder))
    tensors = {f"parameter.{name}": p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().clone().reshape(value.shape or (1,))
    tensors |= {f"average.{name}": value.clone() for name, value in average.items()}
    save_file(tensors, work / "state.safetensors")
    (work / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    target = folder / f"{PREFIX}{progress.step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)
    for old in saved_states(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def saved_states(folder: Path) -> list[Path]:
    """Complete checkpoints under a folder, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def load_state(
    checkpoint: Path,
    digest: str,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a checkpoint's numbers into parameters and optimiser; its progress and averages."""
    progress = Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
    if progress.digest != digest:
        raise InputError(
            f"{checkpoint}: expected a checkpoint of these rows and options, found one of others; "
            "give another output folder, or remove this one to start again"
        )
    tensors = load_file(checkpoint / "state.safetensors")
    stored = {name.partition(".")[2] for name in tensors if name.startswith("parameter.")}
    if stored != set(parameters):
        raise ModelError(f"{checkpoint}: expected the parameters of this network, found others")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if f"exp_avg.{name}" in tensors:
                optimiser.state[parameter] = {
                    "step": tensors[f"step.{name}"].reshape(()),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
    average = {
        name.partition(".")[2]: value
        for name, value in tensors.items()
        if name.startswith("average.")
    }
    return progress, average
