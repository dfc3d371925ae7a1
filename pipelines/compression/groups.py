"""Compressors of heads and neurons, experts, and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...pruners.catalogue import METHODS
from ...pruners.contract import Pruner
from ...pruners.models.block_layouts import layout_of, weight_of
from ...pruners.weight.compensation import bias_of, refit, relative_error
from .compressor import LayerStatistics, block_tensors
from .experts import ExpertCompressor, ExpertOptions
from .group_scores import Scores, best_places, compressed_row, group_scores
from .group_signals import statistics_of
from .layers import LayerCompressor
from .slicing import add_biases, head_index, slice_heads, slice_neurons, zero_heads, zero_neurons
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

Compensate = Literal["none", "bias", "refit", "auto"]
Which = Literal["output", "down"]
_HALF: dict[str, tuple[Which, str]] = {"head": ("output", "attention"), "neuron": ("down", "mlp")}


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
        rows = [row for row in plan if row["unit"] in _HALF]
        self.widths = model_widths(
            self.layout,
            config,
            rows,
            widths=options.widths,
            align=options.align,
            convert=options.convert and options.compensate != "bias",
        )
        touched = [row for row in rows if row["keep"] < row["total"]]
        self._how = {unit: self._compensation(unit, touched) for unit in _HALF}
        choose = [row for row in touched if row.get("kept") is None]
        self.wanted = statistics_of(self.pruner) if choose else frozenset()
        if "bias" in self._how.values():
            self.wanted |= {"mean"}
        if "refit" in self._how.values() or (options.measure and touched):
            self.wanted |= {"gram"}

    def _compensation(self, unit: str, rows: Sequence[Mapping[str, Any]]) -> Compensate:
        """What one half is compensated by; "none" where nothing goes."""
        how = self.options.compensate
        rows = [row for row in rows if row["unit"] == unit]
        if not rows or how in ("none", "refit"):
            return how if rows else "none"
        which, module = _HALF[unit]
        switch = self.layout.output_bias if which == "output" else self.layout.down_bias
        possible = bool(switch) and "model_type" not in self.widths.config
        if how == "bias" and not possible:
            raise InputError(
                f"layer {rows[0]['layer']} {module}: expected a matrix that can have a bias; a"
                f" {self.model_config.model_type} has none there. Choose compensate: refit."
            )
        return "bias" if possible else "refit"

    def _switches(self) -> set[str]:
        """Keys of the configuration that turn the biases on which a compensation needs."""
        found = set()
        for unit, (which, _) in _HALF.items():
            switch = self.layout.output_bias if which == "output" else self.layout.down_bias
            if self._how[unit] == "bias" and isinstance(switch, str):
                found.add(switch)
        return found

    def config(self) -> Mapping[str, Any]:
        """Widths, and switches of biases; known from the plan."""
        changes = {**self.widths.config, **dict.fromkeys(sorted(self._switches()), True)}
        return both_names(self.model_config, changes)

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """See `Compressor`."""
        block, layer = visit.block, visit.layer
        rows = [row for row in plan if row["unit"] in _HALF]
        kept = self._kept(block, statistics, layer, rows)
        self._open_biases(block)
        done = []
        for row, positions in zip(rows, kept, strict=True):
            half = _Half(self, block, row, positions, statistics)
            done.append(half.removed())
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

    def _open_biases(self, block: nn.Module) -> None:
        switches = self._switches()
        for matrix in self.layout.matrices(block):
            attention = matrix.role in ("query", "key", "value", "qkv", "output")
            switch = self.layout.output_bias if attention else self.layout.down_bias
            if switch in switches:
                add_biases(block, self.layout, [matrix.name])


class _Half:
    """One half of one block: what goes, what is left, and what makes up for it."""

    def __init__(
        self,
        owner: GroupCompressor,
        block: nn.Module,
        row: Mapping[str, Any],
        kept: list[int],
        statistics: LayerStatistics,
    ) -> None:
        self.owner, self.block, self.row, self.kept = owner, block, row, kept
        self.statistics, self.layout = statistics, owner.layout
        self.heads = row["unit"] == "head"
        self.width = owner.widths.head if self.heads else owner.widths.neuron
        self.name = self.layout.output if self.heads else self.layout.down
        self.module: Any = block.get_submodule(self.name)

    def removed(self) -> dict[str, Any]:
        """Remove the groups and give the row of `tables.COMPRESSED`."""
        keep, total = len(self.kept), int(self.row["total"])
        old = weight_of(self.module, self.layout).clone()
        if self.width is not None:
            self._cut()
        elif keep < total:
            self._zero()
        error, note = self._compensate(old) if keep < total else (None, "")
        notes = [self.owner.widths.note if self.heads and keep < total else "", note]
        if self.width is not None and keep < self.width and not notes[0]:
            notes[0] = f"{self.width - keep} of {self.width} groups are zeros"
        note = "; ".join(one for one in notes if one)
        return compressed_row(self.row, self.kept, error=error, note=note)

    def _cut(self) -> None:
        if self.heads:
            slice_heads(
                self.block, self.layout, self.owner.model_config, self.kept, width=self.width
            )
        else:
            slice_neurons(self.block, self.layout, self.kept, width=self.width)

    def _zero(self) -> None:
        if self.heads:
            zero_heads(self.block, self.layout, self.owner.model_config, self.kept)
        else:
            zero_neurons(self.block, self.layout, self.kept)

    def _channels(self) -> Tensor:
        """Where the kept groups stood among the inputs of the last matrix."""
        if self.heads:
            return head_index("output", self.layout, self.owner.model_config, self.kept)
        return torch.tensor(self.kept, dtype=torch.int64)

    def _read(self, name: str) -> Tensor:
        key = (self.name, name)
        if key not in self.statistics:
            raise InputError(
                f"layer {self.row['layer']}, {self.name}: expected the statistic `{name}`; found"
                " none. Add it to the `statistics` of the weight_statistics step."
            )
        return self.statistics[key]

    def _compensate(self, old: Tensor) -> tuple[float | None, str]:
        """Change what is left; error and note. `old` (out, in) is the matrix before."""
        how = self.owner._how[self.row["unit"]]
        kept = self._channels()
        gone = torch.ones(old.shape[1], dtype=torch.bool)
        gone[kept] = False
        made, bias = old.float().clone(), None
        made[:, gone.to(made.device)] = 0
        if how == "refit":
            found = refit(old, self._read("gram"), kept, damp=self.owner.options.damp)
            made[:, kept.to(made.device)] = found.to(made.device)
            columns = kept if self.width is None else torch.arange(len(kept))
            weight = weight_of(self.module, self.layout)
            weight[:, columns.to(weight.device)] = found.to(weight.device, weight.dtype)
        elif how == "bias":
            bias = bias_of(old, self._read("mean"), gone.nonzero()[:, 0])
            self.module.bias.data += bias.to(self.module.bias.dtype)
        return self._error(old, made, bias), "" if how == "none" else f"compensated: {how}"

    def _error(self, old: Tensor, made: Tensor, bias: Tensor | None) -> float | None:
        if (self.name, "gram") not in self.statistics:
            return None
        mean, count = torch.zeros(old.shape[1]), 0
        if bias is not None:
            mean, count, bias = self._read("mean"), int(self._read("count")), bias.cpu()
        return relative_error(old.cpu(), made.cpu(), self._read("gram"), bias, mean, count)
