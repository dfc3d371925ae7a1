"""The plan: how much of every part of a model stays, and in how many bits.

Budgets are counted in parameters and met to within one group; what the rows say is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...errors import BudgetError, InputError, RecipeError
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.rules import count_of, top_count
from ...storage import row_id
from .budgets import (
    Floats,
    Ints,
    Units,
    apportion,
    best_groups,
    by_cosine,
    by_importance,
    equal_widths,
)
from .compressor import LayerStatistics
from .parts import Part, model_parts, units_of
from .plan_options import PlanningOptions, PlanOptions

_NARROW, _WIDE_ALIGN = 512, 128


class Layers(Protocol):
    """Statistics by layer, as `statistics.StatisticsTable` gives them."""

    def layer(self, number: int) -> LayerStatistics:
        """Of one layer."""
        ...


@dataclass(frozen=True)
class Sources:
    """What a plan is made from.

    Attributes
    ----------
    statistics
        Of the dense model's layers, where the method or the allocation asks for them.
    budgets
        Rows of a search (the schema of a plan), where the allocation is "search".
    seed
        Of random methods.
    """

    model: StreamedModel
    statistics: Layers | None = None
    budgets: Sequence[Mapping[str, Any]] | None = None
    seed: int = 0

    def layer(self, number: int) -> LayerStatistics:
        """Statistics of one layer; none where there is no table."""
        return {} if self.statistics is None else self.statistics.layer(number)


@dataclass
class Budget:
    """How many units each of the P parts keeps.

    Attributes
    ----------
    kept
        Positions that stay, ascending, where the plan decides them; by part.
    importance
        Of the part's layer, where one was measured; by part.
    """

    keep: Ints
    kept: dict[int, list[int]] = field(default_factory=dict)
    importance: dict[int, float] = field(default_factory=dict)


def make_plan(sources: Sources, options: PlanOptions) -> list[dict[str, Any]]:
    """The rows of `tables.PLAN`, by layer in the order of the forward pass.

    Raises
    ------
    BudgetError
        Whole groups cannot meet the sparsity; the nearest one is named.
    RecipeError
        A group of inputs does not fit a matrix, or an option does not fit the model.
    InputError
        Statistics or budgets that the allocation needs are missing.
    """
    parts = planned_parts(sources.model, options)
    active = active_parts(parts, sources.model.layers, options)
    _check_patterns(active, options)
    units = plan_units(active, options)
    budget = _allocate(sources, options, active, units)
    check_met(active, units, budget.keep, options.share_removed, options)
    place = {part: number for number, part in enumerate(active)}
    return [_row(part, place.get(part), budget, options) for part in parts]


def planned_parts(model: StreamedModel, options: PlanningOptions) -> list[Part]:
    """All parts that the method's unit and the halves name; refuses a model without any."""
    parts = model_parts(model, options.unit, options.parts)
    if not parts:
        raise RecipeError(
            f"`{options.method}` prunes {options.unit}s of {' and '.join(options.parts)}; found"
            f" none in a {model.config.model_type} model. Choose another method, or other `parts`."
        )
    return parts


def active_parts(parts: Sequence[Part], layers: int, options: PlanningOptions) -> list[Part]:
    """The parts of the layers that are not skipped; refuses to skip them all."""
    last = layers - options.skip_last
    found = [part for part in parts if options.skip_first <= part.layer < last]
    if not found:
        raise RecipeError(
            f"skip_first {options.skip_first} and skip_last {options.skip_last} leave no part of"
            f" {layers} layers to plan. Skip fewer."
        )
    return found


def plan_units(parts: Sequence[Part], options: PlanningOptions) -> Units:
    """The parts' units, with the alignment that suits their widths."""
    widest = max((part.total for part in parts if part.unit == "neuron"), default=0)
    align = options.align or (1 if widest < _NARROW else _WIDE_ALIGN)
    return units_of(parts, align=align, min_keep=options.min_keep)


def check_met(
    parts: Sequence[Part], units: Units, keep: Ints, sparsity: float, options: PlanningOptions
) -> None:
    """Refuse a budget that whole groups miss by more than they must, or do not meet at all.

    Where every layer has widths of its own, one group in all is allowed; where all layers have
    the same, and for whole layers and experts, `tolerance`.
    """
    tolerance = _allowed(units, options)
    kept = int((keep * units.cost).sum())
    met = 1 - kept / units.parameters
    if abs(met - sparsity) <= tolerance + 1e-12 and (met > 0 or sparsity == 0):
        return
    strides: dict[str, int] = {}
    together = options.even and options.unit != "weight"
    names = [part.kind if together else part.name for part in parts]
    for name, cost in zip(names, units.step * units.cost, strict=True):
        strides[name] = strides.get(name, 0) + int(cost)
    fine = min(strides.values()) * (1 if met > sparsity else -1)
    coarse = int(np.argmax(units.step * units.cost))
    raise BudgetError(
        f"expected whole groups that meet a sparsity of {sparsity:g} within {tolerance:g}; the"
        f" nearest is {met:.4f}, and the next {1 - (kept + fine) / units.parameters:.4f}"
        f" ({units.name[coarse]} has {units.total[coarse]} units of {units.cost[coarse]}"
        f" parameters, taken {units.step[coarse]} at a time). Ask for one of these, widen `parts`,"
        " lower `align`, or raise `tolerance`."
    )


def _allowed(units: Units, options: PlanningOptions) -> float:
    """How far the sparsity that is met may be from the one asked for."""
    if options.unit != "group" or options.even:
        return options.tolerance
    return max(options.tolerance, float((units.step * units.cost).max()) / units.parameters)


def _allocate(
    sources: Sources, options: PlanOptions, parts: Sequence[Part], units: Units
) -> Budget:
    density = 1 - options.share_removed
    target = count_of(units.parameters, density)
    if options.ratio is not None or not options.share_removed:
        n, m = options.ratio or (1, 1)
        return Budget(units.total * n // m)
    if options.unit == "layer":
        # As many layers as come nearest; else two thirds of three layers would be all of them.
        target = int(units.cost.mean() * round(len(parts) * density))
    if options.unit == "layer" or options.allocation == "global":
        return _by_score(sources, options, parts, units, target)
    if options.allocation == "search":
        return _searched(sources, options, parts, units)
    if options.allocation == "importance":
        return _by_importance(sources, options, parts, units, target)
    if options.allocation == "erk":
        from ...pruners.weight.erk import erk_densities

        densities = erk_densities([part.shape or () for part in parts], density)
        return Budget(apportion(np.array(densities), units, target))
    if options.unit != "weight" and options.even:
        kinds = [part.kind for part in parts]
        return Budget(equal_widths(density, units, kinds, target))
    return Budget(apportion(np.full(len(parts), density), units, target))


def _by_importance(
    sources: Sources, options: PlanOptions, parts: Sequence[Part], units: Units, target: int
) -> Budget:
    layers = sorted({part.layer for part in parts})
    of_layer = np.searchsorted(layers, [part.layer for part in parts])
    statistic = "angle" if options.importance == "cfsp" else "cosine"
    measured = np.array([_mean(sources, layer, statistic) for layer in layers])
    weight = np.bincount(of_layer, units.total * units.cost).astype(np.float64)
    density = 1 - options.share_removed
    if options.importance == "cfsp":
        found = by_importance(measured, weight, density, options.steepness)
    else:
        found = by_cosine(measured, weight, density, options.strength)
    value = measured if options.importance == "cfsp" else -measured
    return Budget(
        apportion(found[of_layer], units, target),
        importance={place: float(value[layer]) for place, layer in enumerate(of_layer)},
    )


def _mean(sources: Sources, layer: int, statistic: str) -> float:
    """A block's statistic as a mean over tokens."""
    found = sources.layer(layer)
    if ("", statistic) not in found or ("", "count") not in found:
        raise InputError(
            f"allocation importance needs the statistic `{statistic}` of every block; found none"
            f" of layer {layer}. Add it to the `statistics` of the weight_statistics step, and give"
            " that step as input `statistics`."
        )
    count = int(found["", "count"])
    return float(found["", statistic]) / count if count else math.nan


def _by_score(
    sources: Sources, options: PlanOptions, parts: Sequence[Part], units: Units, target: int
) -> Budget:
    if options.unit == "weight":
        from .global_scores import count_best_weights

        counts = count_best_weights(sources, options.pruner(), parts, target)
        return Budget(_stepped(counts, units, target))
    scores = _group_scores(sources, options, parts)
    score = np.concatenate(scores)
    part = np.repeat(np.arange(len(parts)), [len(one) for one in scores])
    counts = best_groups(score, units.cost[part], part, units, target)
    budget = Budget(_stepped(counts, units, target))
    if options.unit == "group":
        for place, one in enumerate(scores):
            ids = np.arange(len(one), dtype=np.int64)
            mask, _ = top_count(one, ids, int(budget.keep[place]))
            budget.kept[place] = np.flatnonzero(mask).tolist()
    else:
        budget.importance = {place: float(one[0]) for place, one in enumerate(scores)}
    return budget


def _stepped(counts: Ints, units: Units, target: int) -> Ints:
    """Counts in whole steps, as near to them as the budget allows."""
    fits = ((counts % units.step == 0) | (counts == units.total)) & (counts >= units.lowest())
    return counts if fits.all() else apportion(counts / units.total, units, target)


def _group_scores(sources: Sources, options: PlanOptions, parts: Sequence[Part]) -> list[Floats]:
    """The method's score of every group of every part, higher = kept."""
    from .groups import group_scores

    model, method = sources.model, options.pruner()
    made: list[Floats] = []
    found: Mapping[str, Any] = {}
    seen = -1
    for part in parts:
        if part.layer != seen:
            seen = part.layer
            found = group_scores(
                method,
                model.block(seen),
                model.layout,
                model.config,
                sources.layer(seen),
                seen,
                seed=sources.seed,
            )
        if part.unit not in found:
            raise RecipeError(
                f"{part.name}: `{options.method}` scores no {part.unit}s. Leave that half out of"
                " `parts`, or choose another method."
            )
        made.append(np.asarray(found[part.unit][0], np.float64))
    return made


def _searched(
    sources: Sources, options: PlanOptions, parts: Sequence[Part], units: Units
) -> Budget:
    """What the search found for each part."""
    if sources.budgets is None:
        raise InputError(
            "allocation search needs budgets; found none. Give a search_budgets step as input"
            " `budgets`."
        )
    rows = {(row["layer"], row["module"], row["unit"]): row for row in sources.budgets}
    keep: list[int] = []
    kept: dict[int, list[int]] = {}
    for place, part in enumerate(parts):
        row = rows.get((part.layer, part.module, part.unit))
        if row is None or row["total"] != part.total:
            raise InputError(
                f"{part.name}: expected a budget of {part.total} units ({part.unit}); found"
                f" {'none' if row is None else row['total']}. Search with the same model, method,"
                " `parts` and skipped layers."
            )
        keep.append(int(row["keep"]))
        if row.get("kept") is not None:
            kept[place] = list(row["kept"])
    met = 1 - int((np.array(keep) * units.cost).sum()) / units.parameters
    if abs(met - options.sparsity) > _allowed(units, options):
        raise RecipeError(
            f"allocation search: `budgets` remove {met:.4f} of the parameters, and the plan"
            f" asks for {options.sparsity:g}. Give both steps the same `sparsity`."
        )
    return Budget(np.array(keep, np.int64), kept)


def _check_patterns(parts: Sequence[Part], options: PlanOptions) -> None:
    """Refuse matrices whose inputs do not divide into the pattern or the groups of a scale."""
    for part in parts:
        if part.shape is None:
            continue
        inputs = part.shape[1]
        if options.ratio is not None and inputs % options.ratio[1]:
            raise BudgetError(
                f"{part.name}: expected inputs in groups of {options.ratio[1]} for the pattern"
                f" {options.pattern}; found {inputs}. Leave that half out of `parts`, or prune"
                " without a pattern."
            )
        size = options.group_size
        if options.bits is not None and size and inputs % size:
            fits = [g for g in range(1, size + 1) if inputs % g == 0]
            raise RecipeError(
                f"{part.name}: expected inputs that divide into groups of {size} (group_size);"
                f" found {inputs}. Use {fits[-1]}, or 0 for one scale a row."
            )


def _row(part: Part, place: int | None, budget: Budget, options: PlanOptions) -> dict[str, Any]:
    """A row of the plan; a part of a skipped layer keeps everything."""
    if place is None:
        return row_of(part, part.total)
    made = row_of(part, int(budget.keep[place]))
    if options.ratio is not None:
        made["n"], made["m"] = options.ratio
    if options.bits is not None:
        made["bits"], made["group_size"] = options.bits, options.group_size
    return made | {"importance": budget.importance.get(place), "kept": budget.kept.get(place)}


def row_of(part: Part, keep: int, step: str = "plan_compression") -> dict[str, Any]:
    """A row of `tables.PLAN` that says how many units of a part stay, and nothing more."""
    empty = dict.fromkeys(("n", "m", "bits", "group_size", "importance", "kept"))
    return {
        "id": row_id(step, part.layer, part.module, part.unit),
        "layer": part.layer,
        "module": part.module,
        "unit": part.unit,
        "total": part.total,
        "keep": keep,
        "parameters": part.parameters,
        **empty,
    }


def plan_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Parameters before and after and the sparsity met, by unit and in all ("all")."""
    made: dict[str, dict[str, float]] = {}
    for row in rows:
        after = row["parameters"] // row["total"] * row["keep"]
        for unit in (row["unit"], "all"):
            one = made.setdefault(unit, {"before": 0, "after": 0})
            one["before"] += row["parameters"]
            one["after"] += after
    for one in made.values():
        one["sparsity"] = 1 - one["after"] / one["before"]
    return made
