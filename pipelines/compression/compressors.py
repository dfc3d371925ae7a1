"""The compressor that carries a plan out, by what the plan is about."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...pruners.models.device import pick_device
from ...pruners.models.streamed_model import StreamedModel
from .apply_options import CompressWeightsOptions
from .compressor import Compressor
from .groups import (
    ExpertCompressor,
    ExpertOptions,
    GroupCompressor,
    GroupOptions,
    LayerCompressor,
)
from .matrices import MatrixCompressor, MatrixOptions
from .rotated import rotated_model


def open_model(
    folder: str, planned: Mapping[str, Any], options: CompressWeightsOptions, work: Path
) -> StreamedModel:
    """The model to walk through: as it is, or rotated where RSQ wants it so.

    Parameters
    ----------
    planned
        Options of the plan's manifest.
    work
        Folder of the unfinished layers; the rotated copy lies beside it and is made once.
    """
    device = pick_device(options.device)
    rsq = planned.get("bits") is not None and planned.get("quantiser") == "rsq"
    attention = "eager" if rsq else "sdpa"
    if rsq and options.rotate:
        made = rotated_folder(work)
        if not made.is_dir():
            unfinished = made.with_name(f".{made.name}.{os.getpid()}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            rotated_model(StreamedModel(folder), unfinished, seed=options.rotation_seed)
            unfinished.rename(made)
        folder = str(made)
    return StreamedModel(folder, device=device, dtype=options.dtype, attention=attention)


def rotated_folder(work: Path) -> Path:
    """Where the rotated copy of a model lies while it is compressed."""
    return work.with_name(f"{work.name}-rotated")


def make_compressor(
    model: StreamedModel,
    planned: Mapping[str, Any],
    plan: Sequence[Mapping[str, Any]],
    options: CompressWeightsOptions,
    seed: int,
) -> Compressor:
    """The compressor of the plan's unit, set up as plan and step say."""
    unit, method, own = planned["unit"], planned["method"], planned.get("options") or {}
    if unit == "group":
        return GroupCompressor(
            model.config,
            plan,
            GroupOptions(
                method=method,
                options=own,
                widths="padded" if planned.get("widths") == "padded" else "uniform",
                align=planned.get("align") or 1,
                compensate=options.compensate,
                measure=options.measure,
                convert=True,
                seed=seed,
            ),
        )
    if unit == "expert":
        expert = ExpertOptions(method=method, options=own, seed=seed)
        return ExpertCompressor(model.config, plan, expert)
    if unit == "layer":
        return LayerCompressor(model.config, plan)
    return MatrixCompressor(
        MatrixOptions(
            method=method,
            method_options=own,
            quantiser="none" if planned.get("bits") is None else planned["quantiser"],
            update=options.update,
            measure=options.measure,
            damping=options.damping,
            block=options.block,
            act_order=options.act_order,
            symmetric=options.symmetric,
            clip=options.clip,
            seed=seed,
        )
    )
