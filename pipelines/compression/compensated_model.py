"""A compressed model whose removed heads and neurons are compensated, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError
from ...pruners.models.block_layouts import weight_of
from ...pruners.models.streamed_model import StreamedModel
from .compensating import (
    UNITS,
    Compensate,
    Half,
    bias_switches,
    compensation_of,
    matrix_after,
    open_biases,
)
from .model_tables import write_model
from .plan import Layers
from .widths import both_names

Row = dict[str, Any]


class CompensatedModel:
    """A compressed model beside the dense one that it was made from.

    Parameters
    ----------
    dense, compressed
        Both with as many layers.
    rows
        Of `tables.COMPRESSED`: which groups stayed where (unit head or neuron).
    statistics
        Of the dense model's layers: "mean" for a bias, "gram" for a refit.
    how, damp
        As in `groups.GroupOptions`.

    Attributes
    ----------
    rows
        As given, with error and note of what was done; complete once `write` is through.

    Raises
    ------
    InputError
        No groups were removed, one was compensated before, layers were dropped, or a bias is
        demanded that the architecture cannot hold.
    """

    def __init__(
        self,
        dense: StreamedModel,
        compressed: StreamedModel,
        rows: Sequence[Mapping[str, Any]],
        statistics: Layers,
        *,
        how: Compensate = "auto",
        damp: float = 0.01,
    ) -> None:
        self.dense, self.compressed, self.statistics = dense, compressed, statistics
        self.rows: list[Row] = [dict(row) for row in rows]
        self.damp = damp
        gone = [row for row in self.rows if row["unit"] in UNITS and row["kept"] < row["total"]]
        _check(dense, compressed, gone)
        layout, kind = compressed.layout, compressed.config.model_type
        self.how = {
            unit: compensation_of(
                layout, kind, unit, [row for row in gone if row["unit"] == unit], how
            )
            for unit in UNITS
        }
        self.switches = bias_switches(layout, self.how)

    def write(self, folder: Path) -> list[Path]:
        """The model's files, in a folder that exists and is empty; one layer is held at a time."""
        source = self.compressed
        config = json.loads((source.folder / "config.json").read_text("utf-8"))
        config |= both_names(source.config, dict.fromkeys(sorted(self.switches), True))
        return write_model(folder, self._parts(), config, source.folder)

    def _parts(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        source = self.compressed
        yield "00000", {name: source.tensors.read(name) for name in source.outside_names()}
        for layer in range(source.layers):
            block = self._layer(layer)
            names = source.block_names(layer)
            dtype = source.tensors.read(next(iter(names.values()))).dtype
            made = {}
            for name, param in block.named_parameters():
                beside = names[f"{name.removesuffix('.bias')}.weight"] if name not in names else ""
                stored = names.get(name) or f"{beside.removesuffix('weight')}bias"
                made[stored] = param.detach().to(dtype)
            yield f"{layer + 1:05d}", made

    def _layer(self, layer: int) -> Any:
        block = self.compressed.block(layer)
        open_biases(block, self.compressed.layout, self.switches)
        rows = [row for row in self.rows if row["layer"] == layer and row["unit"] in UNITS]
        rows = [row for row in rows if row["kept"] < row["total"]]
        if not rows:
            return block
        statistics, before = self.statistics.layer(layer), self.dense.block(layer)
        for row in rows:
            name = matrix_after(self.dense.layout, row["unit"])
            half = Half(
                layer,
                row["unit"],
                weight_of(before.get_submodule(name), self.dense.layout),
                row["positions"],
                self.dense.layout,
                self.dense.config,
                statistics,
            )
            how = self.how[row["unit"]]
            row["error"] = half.compensate(block.get_submodule(name), how, self.damp)
            row["note"] = "; ".join(one for one in (row["note"], f"compensated: {how}") if one)
        return block


def _check(dense: StreamedModel, compressed: StreamedModel, gone: Sequence[Row]) -> None:
    if not gone:
        raise InputError(
            "expected a model without some heads or neurons; found none removed. For single"
            " weights choose sparsegpt or `update` in compress_weights."
        )
    done = next((row for row in gone if "compensated" in row["note"]), None)
    if done is not None:
        raise InputError(
            f"layer {done['layer']} {done['module']}: expected no compensation yet; found"
            f" `{done['note']}`. Compress with `compensate: none` first."
        )
    if dense.layers != compressed.layers:
        raise InputError(
            f"expected as many layers as in the dense model, {dense.layers}; found"
            f" {compressed.layers}. Give the model that was compressed."
        )
