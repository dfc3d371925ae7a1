"""A search for budgets from a model's folder to the rows of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pruners.models.device import pick_device
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.rules import count_of
from ...pruners.weight.erk import erk_densities
from .budgets import Ints, Units, apportion
from .compressor import Compressor
from .evolution import Genome, LoggedFitness, Space, evolve
from .groups import GroupCompressor, GroupOptions
from .matrices import MatrixCompressor, MatrixOptions
from .parts import Part
from .plan import Layers, active_parts, check_met, plan_units, planned_parts, row_of
from .search_options import SearchBudgetsOptions
from .supernet import LevelStore, Supernet


def search(
    folder: str,
    rows: Sequence[npt.NDArray[np.integer[Any]]],
    statistics: Layers | None,
    options: SearchBudgetsOptions,
    work: Path,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `tables.PLAN` for the best budget, and what the search came to.

    `work` holds levels and answers, so that a killed search asks none again. What it came to:
    fitness of the start and of the best (KL to the dense model, nats a token), the best
    so far after each generation, evaluations and their limit.
    """
    model = StreamedModel(folder, device=pick_device(options.device), dtype=options.dtype)
    parts = planned_parts(model, options)
    active = active_parts(parts, model.layers, options)
    units = plan_units(active, options)
    start = _start(active, units, options)
    place = {part: number for number, part in enumerate(active)}
    dense = [row_of(part, part.total, "search_budgets") for part in active]
    levels = LevelStore(
        work / "levels", model, active, dense, _maker(model, options, seed), statistics
    )
    net = Supernet(
        model,
        rows,
        levels,
        active,
        tokens=options.tokens,
        top=options.top,
        tokens_a_batch=options.tokens_a_batch,
    )
    fitness = LoggedFitness(work / "evaluations.jsonl", net)
    found = evolve(start, _space(active, units, options), fitness, options.schedule(), seed)
    keep = [found.genome[place[part]] if part in place else part.total for part in parts]
    summary = {
        "start": found.history[0],
        "best": found.fitness,
        "history": list(found.history),
        "evaluations": found.evaluations,
        "limit": options.schedule().limit,
    }
    made = [row_of(p, k, "search_budgets") for p, k in zip(parts, keep, strict=True)]
    return made, summary


def _start(parts: Sequence[Part], units: Units, options: SearchBudgetsOptions) -> Genome:
    """Every part alike, or by the sizes of matrices."""
    density = 1 - options.sparsity
    wish = [density] * len(parts)
    if options.start == "erk":
        wish = erk_densities([part.shape or () for part in parts], density)
    keep: Ints = apportion(np.array(wish), units, count_of(units.parameters, density))
    check_met(parts, units, keep, options.sparsity, options)
    return tuple(int(count) for count in keep)


def _space(parts: Sequence[Part], units: Units, options: SearchBudgetsOptions) -> Space:
    stride = np.maximum(1, np.round(units.total * options.level / units.step)) * units.step
    return Space(
        low=tuple(int(count) for count in units.lowest()),
        total=tuple(int(count) for count in units.total),
        step=tuple(int(count) for count in units.step),
        stride=tuple(int(count) for count in stride),
        kind=tuple(part.kind for part in parts),
    )


def _maker(model: StreamedModel, options: SearchBudgetsOptions, seed: int) -> Any:
    """The compressor that carries the plan out, for one part at a time and at full width."""

    def make(row: Mapping[str, Any]) -> Compressor:
        if options.unit == "group":
            group = GroupOptions(
                method=options.method,
                options=options.options,
                widths="masked",
                compensate=options.compensate,
                seed=seed,
            )
            return GroupCompressor(model.config, [row], group)
        matrix = MatrixOptions(
            method=options.method,
            method_options=options.options,
            update=options.compensate == "refit",
            seed=seed,
        )
        return MatrixCompressor(matrix)

    return make
