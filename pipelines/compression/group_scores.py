"""Scores of a layer's groups, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ...errors import InputError
from ...pruners.contract import Pruner
from ...pruners.models.block_layouts import BlockLayout
from ...pruners.rules import top_count
from .compressor import LayerStatistics
from .group_signals import layer_signals
from .parts import block_parts

Scores = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]


def group_scores(
    method: Pruner,
    block: nn.Module,
    layout: BlockLayout,
    config: Any,
    statistics: LayerStatistics,
    layer: int,
    *,
    seed: int = 0,
) -> Scores:
    """Score and cost in parameters of every group of a layer, by unit.

    Each (groups,): score float32, higher = kept, as the method's own call gives it; cost int64.
    Units: "head" (key-value groups) and "neuron", "expert", or "layer"; one that the method does
    not score or the layer does not have is left out.

    Raises InputError where a statistic is missing or not finite, by layer, module and name.
    """
    made: Scores = {}
    cost = {part.unit: part.cost for part in block_parts(block, layout, config, layer, method.unit)}
    found = layer_signals(method, block, layout, config, statistics, layer)
    for unit, signals in found.items():
        score = method(signals, seed=seed).score
        made[unit] = score, np.full(signals.n, cost[unit], np.int64)
    return made


def best_places(scores: Scores, row: Mapping[str, Any], method: str) -> list[int]:
    """Positions of the `keep` best groups of a plan's row, ascending; ties to the smaller."""
    where = f"layer {row['layer']} {row['module']}"
    if row["unit"] not in scores:
        raise InputError(
            f"{where}: expected scores of its {row['unit']}s; {method} gives none. Leave that half"
            " out of the plan's `parts`, or choose another method."
        )
    score = scores[row["unit"]][0]
    if len(score) != row["total"]:
        raise InputError(
            f"{where}: the plan has {row['total']} {row['unit']}s and the model {len(score)}. Plan"
            " for this model."
        )
    mask, _ = top_count(score, np.arange(len(score), dtype=np.int64), int(row["keep"]))
    return [int(place) for place in np.flatnonzero(mask)]


def compressed_row(
    row: Mapping[str, Any], kept: list[int], *, error: float | None = None, note: str = ""
) -> dict[str, Any]:
    """A row of `tables.COMPRESSED`, without id and layer, for the positions that stay of a plan's
    row."""
    return {
        "module": row["module"],
        "unit": row["unit"],
        "total": int(row["total"]),
        "kept": len(kept),
        "bits": None,
        "group_size": None,
        "error": error,
        "positions": kept,
        "note": note,
    }
