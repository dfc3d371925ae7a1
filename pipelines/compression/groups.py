"""Compressors of heads and neurons, experts, and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...pruners.catalogue import METHODS
from ...pruners.contract import Pruner
from ...pruners.models.block_layouts import LAYOUTS, layout_of, weight_of
from .compensating import (
    UNITS,
    Compensate,
    Half,
    bias_switches,
    compensation_of,
    matrix_after,
    open_biases,
)
from .compressor import LayerStatistics, block_tensors
from .experts import ExpertCompressor, ExpertOptions
from .group_scores import Scores, best_places, compressed_row, group_scores
from .group_signals import statistics_of
from .layers import LayerCompressor
from .slicing import slice_heads, slice_neurons, zero_heads, zero_neurons
from .walk import LayerVisit, Made
from .widths import Widths, both_names, model_widths

__all__ = [
    "ExpertCompressor",
    "ExpertOptions",
    "GroupCompressor",
    "GroupOptions",
    "LayerCompressor",
    "group_scores",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """How heads and neurons are removed.

    Attributes
    ----------
    method, options
        A method of the catalogue for groups, and its options.
    widths
        "uniform": all layers are cut to the one width that the plan gives them. "padded": to the
        widest, the rest zeros. "masked": zeros at full width.
    align
        Neurons kept are a multiple of it.
    compensate
        "none"; "bias" of the mean (FLAP); "refit" of the matrix after the groups; "auto": bias
        where the architecture has one there, else refit.
    damp
        Ridge of the refit, as a share of the gram's mean diagonal.
    measure
        Measure each half's output error (needs the gram; a refit has it).
    convert
        Save a Llama whose own configuration refuses the number of heads as a Mistral without a
        window, which computes the same.
    seed
        Of random methods.
    """

    method: str = "flap"
    options: Mapping[str, Any] = field(default_factory=dict)
    widths: Widths = "uniform"
    align: int = 1
    compensate: Compensate = "none"
    damp: float = 0.01
    measure: bool = False
    convert: bool = False
    seed: int = 0

    def pruner(self) -> Pruner:
        """The method, set up."""
        return METHODS[self.method](**self.options)


class GroupCompressor:
    """Removes heads and neurons of one model as a plan says; see `Compressor`.

    Raises
    ------
    BudgetError
        A width that whole groups cannot have; the layer and the nearest possible are named.
    InputError
        Widths that differ where they must not, or a bias that the architecture cannot hold.
    """

    def __init__(
        self, config: Any, plan: Sequence[Mapping[str, Any]], options: GroupOptions
    ) -> None:
        self.options, self.model_config = options, config
        self.layout = layout_of(config)
        self.pruner = options.pruner()
        rows = [row for row in plan if row["unit"] in UNITS]
        self.widths = model_widths(
            self.layout,
            config,
            rows,
            widths=options.widths,
            align=options.align,
            convert=options.convert and options.compensate != "bias",
        )
        touched = [row for row in rows if row["keep"] < row["total"]]
        kind = self.widths.config.get("model_type", config.model_type)
        self._how = {
            unit: compensation_of(
                LAYOUTS[kind],
                kind,
                unit,
                [row for row in touched if row["unit"] == unit],
                options.compensate,
            )
            for unit in UNITS
        }
        self._switches = bias_switches(self.layout, self._how)
        choose = [row for row in touched if row.get("kept") is None]
        self.wanted = statistics_of(self.pruner) if choose else frozenset()
        if "bias" in self._how.values():
            self.wanted |= {"mean"}
        if "refit" in self._how.values() or (options.measure and touched):
            self.wanted |= {"gram"}

    def config(self) -> Mapping[str, Any]:
        """Widths, and switches of biases; known from the plan."""
        changes = {**self.widths.config, **dict.fromkeys(sorted(self._switches), True)}
        return both_names(self.model_config, changes)

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """See `Compressor`."""
        block, layer = visit.block, visit.layer
        rows = [row for row in plan if row["unit"] in UNITS]
        kept = self._kept(block, statistics, layer, rows)
        open_biases(block, self.layout, self._switches)
        done = [
            self._remove(block, row, positions, statistics)
            for row, positions in zip(rows, kept, strict=True)
        ]
        return block_tensors(visit), done

    def _kept(
        self,
        block: nn.Module,
        statistics: LayerStatistics,
        layer: int,
        rows: Sequence[Mapping[str, Any]],
    ) -> list[list[int]]:
        """Positions that stay, for each row; all are chosen before anything is changed."""
        made: list[list[int]] = []
        scores: Scores | None = None
        for row in rows:
            if row["keep"] == row["total"]:
                made.append(list(range(row["total"])))
            elif row.get("kept") is not None:
                made.append([int(place) for place in row["kept"]])
            else:
                if scores is None:
                    scores = group_scores(
                        self.pruner,
                        block,
                        self.layout,
                        self.model_config,
                        statistics,
                        layer,
                        seed=self.options.seed,
                    )
                made.append(best_places(scores, row, self.options.method))
        return made

    def _remove(
        self, block: nn.Module, row: Mapping[str, Any], kept: list[int], given: LayerStatistics
    ) -> dict[str, Any]:
        """Remove one half's groups, compensate, and give the row of `tables.COMPRESSED`."""
        unit, keep, total = row["unit"], len(kept), int(row["total"])
        width = self.widths.head if unit == "head" else self.widths.neuron
        module = block.get_submodule(matrix_after(self.layout, unit))
        old = weight_of(module, self.layout).clone()
        if width is not None:
            self._cut(block, unit, kept, width)
        elif keep < total:
            self._zero(block, unit, kept)
        if keep == total:
            return compressed_row(row, kept)
        how = self._how[unit]
        half = Half(row["layer"], unit, old, kept, self.layout, self.model_config, given)
        error = half.compensate(module, how, self.options.damp)
        notes = [self.widths.note if unit == "head" else ""]
        if width is not None and keep < width and not notes[0]:
            notes[0] = f"{width - keep} of {width} groups are zeros"
        notes.append("" if how == "none" else f"compensated: {how}")
        return compressed_row(row, kept, error=error, note="; ".join(n for n in notes if n))

    def _cut(self, block: nn.Module, unit: str, kept: list[int], width: int) -> None:
        if unit == "head":
            slice_heads(block, self.layout, self.model_config, kept, width=width)
        else:
            slice_neurons(block, self.layout, kept, width=width)

    def _zero(self, block: nn.Module, unit: str, kept: list[int]) -> None:
        if unit == "head":
            zero_heads(block, self.layout, self.model_config, kept)
        else:
            zero_neurons(block, self.layout, kept)
