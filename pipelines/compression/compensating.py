"""Compensation of a half of a block whose heads or neurons are gone; see pruners/weight's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...pruners.models.block_layouts import BlockLayout, weight_of
from ...pruners.weight.compensation import bias_of, refit, relative_error
from .compressor import LayerStatistics
from .parts import half_of
from .slicing import add_biases, head_index

Compensate = Literal["none", "bias", "refit", "auto"]
Row = Mapping[str, Any]
UNITS = ("head", "neuron")


def matrix_after(layout: BlockLayout, unit: str) -> str:
    """The matrix that reads the heads or the neurons."""
    return layout.output if unit == "head" else layout.down


def switch_of(layout: BlockLayout, unit: str) -> bool | str:
    """Whether that matrix has a bias: True, False, or the configuration's key for it."""
    return layout.output_bias if unit == "head" else layout.down_bias


def compensation_of(
    layout: BlockLayout, kind: str, unit: str, rows: Sequence[Row], how: Compensate
) -> Compensate:
    """ "bias", "refit" or "none": what one unit's half is compensated by.

    Parameters
    ----------
    kind
        The model type, as it will be saved.
    rows
        Those (layer, module) of the unit whose groups go; "none" where there are none.

    Raises InputError where a bias is demanded of an architecture that has none there.
    """
    if not rows or how in ("none", "refit"):
        return how if rows else "none"
    possible = bool(switch_of(layout, unit))
    if how == "bias" and not possible:
        raise InputError(
            f"layer {rows[0]['layer']} {rows[0]['module']}: expected a matrix that can have a"
            f" bias; a {kind} has none there. Choose compensate: refit."
        )
    return "bias" if possible else "refit"


def bias_switches(layout: BlockLayout, how: Mapping[str, Compensate]) -> set[str]:
    """Keys of the configuration that turn the biases on which compensations need."""
    switches = {switch_of(layout, unit) for unit in UNITS if how[unit] == "bias"}
    return {switch for switch in switches if isinstance(switch, str)}


def open_biases(block: nn.Module, layout: BlockLayout, switches: Collection[str]) -> None:
    """Give all matrices that the switches are about a bias, of zeros where they have none."""
    names = [
        matrix.name
        for matrix in layout.matrices(block)
        if switch_of(layout, "head" if half_of(matrix) == "attention" else "neuron") in switches
    ]
    add_biases(block, layout, names)


@dataclass(frozen=True)
class Half:
    """A half whose groups are gone: what was before, and what is known of its inputs.

    Attributes
    ----------
    layer, unit
        Which half.
    old
        (out, in) the matrix that reads the groups, before.
    kept
        Positions of the groups that stay, ascending.
    config
        Of the model before.
    statistics
        Of the layer's inputs, before.
    """

    layer: int
    unit: str
    old: Tensor
    kept: Sequence[int]
    layout: BlockLayout
    config: Any
    statistics: LayerStatistics

    @property
    def channels(self) -> Tensor:
        """Where the kept groups stand among the inputs of `old`."""
        if self.unit == "head":
            return head_index("output", self.layout, self.config, self.kept)
        return torch.tensor(list(self.kept), dtype=torch.int64)

    def read(self, name: str) -> Tensor:
        """A statistic of the matrix's inputs; raises InputError where it is missing."""
        key = (matrix_after(self.layout, self.unit), name)
        if key not in self.statistics:
            raise InputError(
                f"layer {self.layer}, {key[0]}: expected the statistic `{name}`; found none. Add"
                " it to the `statistics` of the weight_statistics step."
            )
        return self.statistics[key]

    def compensate(self, module: Any, how: Compensate, damp: float) -> float | None:
        """Change the matrix `module` that is left, in place; the relative error of its outputs.

        Its columns are the kept channels, then zeros; or all channels, those that went zero. The
        error is None where there is no gram.
        """
        kept = self.channels
        gone = torch.ones(self.old.shape[1], dtype=torch.bool)
        gone[kept] = False
        made, bias = self.old.float().clone(), None
        made[:, gone.to(made.device)] = 0
        if how == "refit":
            found = refit(self.old, self.read("gram"), kept, damp=damp)
            made[:, kept.to(made.device)] = found.to(made.device)
            weight = weight_of(module, self.layout)
            whole = weight.shape[1] == self.old.shape[1]
            columns = (kept if whole else torch.arange(len(kept))).to(weight.device)
            weight[:, columns] = found.to(weight.device, weight.dtype)
        elif how == "bias":
            bias = bias_of(self.old, self.read("mean"), gone.nonzero()[:, 0])
            module.bias.data += bias.to(module.bias.device, module.bias.dtype)
        return self._error(made, bias)

    def _error(self, made: Tensor, bias: Tensor | None) -> float | None:
        if (matrix_after(self.layout, self.unit), "gram") not in self.statistics:
            return None
        mean, count = torch.zeros(self.old.shape[1]), 0
        if bias is not None:
            mean, count, bias = self.read("mean"), int(self.read("count")), bias.cpu()
        gram = self.read("gram")
        return relative_error(self.old.cpu(), made.cpu(), gram.cpu(), bias, mean.cpu(), count)
