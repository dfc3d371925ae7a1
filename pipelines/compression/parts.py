"""The parts of a model that a plan is about: what they are called, their units, what those cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .budgets import Units

if TYPE_CHECKING:
    from torch import nn

    from ...pruners.models.block_layouts import BlockLayout, Matrix
    from ...pruners.models.streamed_model import StreamedModel

ATTENTION, MLP, EXPERTS = "attention", "mlp", "experts"


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix, or the heads, neurons or experts of one layer, or a whole layer.

    Attributes
    ----------
    layer, module, unit
        As in `tables.PLAN`.
    half
        "attention" or "mlp": the half of the block it stands in; "" for a whole layer.
    total
        Units that it has.
    parameters
        Weights of its matrices (biases, norms and routers are left out).
    shape
        (out, in) of a matrix, else None.
    """

    layer: int
    module: str
    unit: str
    half: str
    total: int
    parameters: int
    shape: tuple[int, int] | None = None

    @property
    def cost(self) -> int:
        """Parameters of one unit."""
        return self.parameters // self.total

    @property
    def name(self) -> str:
        """For messages."""
        return f"layer {self.layer} {self.module}".rstrip()

    @property
    def kind(self) -> str:
        """Parts of the same kind in other layers can trade units."""
        return f"{self.module} {self.total} x {self.cost}"


def model_parts(model: StreamedModel, unit: str, halves: Collection[str]) -> list[Part]:
    """The parts of a model by layer, in the order of the forward pass.

    `unit` is what a method decides about ("weight", "group", "expert", "layer"), `halves` which
    halves of the blocks take part.
    """
    found: list[Part] = []
    for layer in range(model.layers):
        found += block_parts(model.empty_block(layer), model.layout, model.config, layer, unit)
    return [part for part in found if part.half in halves or not part.half]


def block_parts(
    block: nn.Module, layout: BlockLayout, config: object, layer: int, unit: str
) -> list[Part]:
    """The parts of one block; see `model_parts`."""
    matrices = layout.matrices(block)
    sizes = {matrix.name: matrix_shape(block, layout, matrix) for matrix in matrices}
    if unit == "weight":
        return [
            Part(layer, m.name, "weight", half_of(m), o * i, o * i, (o, i))
            for m in matrices
            for o, i in [sizes[m.name]]
        ]
    count = {name: out * into for name, (out, into) in sizes.items()}
    if unit == "layer":
        return [Part(layer, "", "layer", "", 1, sum(count.values()))]
    if unit == "expert":
        return _experts(layer, matrices, count)
    heads = layout.sizes(config)[1]
    attention = sum(count[m.name] for m in matrices if half_of(m) == ATTENTION)
    made = [Part(layer, ATTENTION, "head", ATTENTION, heads, attention)]
    dense = [m for m in matrices if half_of(m) == MLP]
    if all(m.expert is None and not m.shared for m in dense):
        neurons = next(sizes[m.name][1] for m in dense if m.role == "down")
        parameters = sum(count[m.name] for m in dense)
        made.append(Part(layer, MLP, "neuron", MLP, neurons, parameters))
    return made


def _experts(layer: int, matrices: Sequence[Matrix], count: dict[str, int]) -> list[Part]:
    experts = [m for m in matrices if m.expert is not None]
    if not experts:
        return []
    total = 1 + max(m.expert for m in experts if m.expert is not None)
    parameters = sum(count[m.name] for m in experts)
    return [Part(layer, EXPERTS, "expert", MLP, total, parameters)]


def half_of(matrix: Matrix) -> str:
    """Which half of the block a matrix stands in."""
    return ATTENTION if matrix.role in ("query", "key", "value", "qkv", "output") else MLP


def matrix_shape(block: nn.Module, layout: BlockLayout, matrix: Matrix) -> tuple[int, int]:
    """(out, in) of a matrix, also where it holds no memory."""
    weight = block.get_submodule(matrix.name).weight
    rows, columns = weight.shape  # type: ignore[misc]
    return (int(columns), int(rows)) if layout.transposed else (int(rows), int(columns))


def units_of(parts: Sequence[Part], *, align: int, min_keep: float) -> Units:
    """The parts as arrays. Neurons go in multiples of `align`; of every part some unit stays."""
    total = np.array([part.total for part in parts], np.int64)
    step = [align if part.unit == "neuron" else 1 for part in parts]
    floor = np.ceil(np.round(total * min_keep, 9)).astype(np.int64)
    is_layer = np.array([part.unit == "layer" for part in parts], np.bool_)
    return Units(
        total=total,
        cost=np.array([part.cost for part in parts], np.int64),
        step=np.minimum(np.array(step, np.int64), np.maximum(total, 1)),
        low=np.where(is_layer, 0, np.maximum(floor, 1)),
        name=tuple(part.name for part in parts),
    )
