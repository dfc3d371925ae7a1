"""Statistics of layers: made in a walk, kept as rows of a table, and merged over parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ...errors import InputError, StoreError
from ...pruners.signals.block_statistics import (
    BlockStatistics,
    TokenWeights,
    check_wanted,
    merge_statistics,
)
from ...storage import Table
from ...storage.ids import row_id
from .compressor import LayerStatistics
from .tables import SLICE_BYTES, STATISTICS
from .walk import LayerVisit

Key = tuple[str, str]
_DTYPES: dict[str, str] = {"float32": "<f4", "float64": "<f8", "int64": "<i8"}


def layer_statistics(
    visit: LayerVisit,
    wanted: frozenset[str],
    *,
    keep: bool = True,
    weights: TokenWeights | None = None,
) -> LayerStatistics:
    """Statistics of one layer over all batches, in one run of the block.

    They are over the batches' counted tokens; over all valid ones where attention is looked at.

    Parameters
    ----------
    wanted
        Names as in pruners/signals/block_statistics.py; counts are given along with them. Names
        of gradients are passed over: those come from a table of the step `weight_statistics`.
    keep
        Whether the block's outputs go to the next layer; see `LayerVisit.forward`.
    weights
        Of "weighted_gram".

    Returns arrays by (module, statistic), on the CPU. Where nothing is wanted and nothing kept,
    the block is not run.

    Raises InputError for a name that is no statistic.
    """
    wanted = check_wanted(wanted)
    if not wanted:
        if keep:
            visit.forward()
        return {}

    # Attention is received by all tokens, so its statistics look at all.
    everything = bool(wanted & {"weighted_gram", "attention"})

    def valid() -> Tensor:
        assert visit.current is not None
        return visit.current.valid if everything else visit.current.counted

    block, layout = visit.block, visit.layout
    with BlockStatistics(block, layout, wanted, valid, weights, stop=not keep) as made:
        visit.forward(lambda batch, hidden, out: made.after(hidden, out), keep=keep)
    return made.result()


def named(statistics: LayerStatistics) -> dict[str, Tensor]:
    """The arrays under one name each, for a journal."""
    return {f"{module}|{name}": array for (module, name), array in statistics.items()}


def keyed(tensors: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    """What `named` made its names of, by (module, statistic)."""
    cuts = {name: name.rpartition("|") for name in tensors}
    return {(cuts[name][0], cuts[name][2]): array for name, array in tensors.items()}


def statistics_rows(part: int, layer: int, statistics: LayerStatistics) -> Iterator[pa.Table]:
    """Rows of `tables.STATISTICS` for one layer, an array at a time, in order of key.

    The same arrays give the same rows, with ids from part, layer, module, statistic and slice.
    """
    for module, name in sorted(statistics):
        array = statistics[module, name].detach().cpu()
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise InputError(
                f"layer {layer}, {module} {name}: expected {', '.join(_DTYPES)}; found {dtype}."
            )
        flat = array.contiguous().numpy().astype(_DTYPES[dtype], copy=False)
        data = flat.reshape(-1).view(np.uint8)
        cuts = range(0, max(len(data), 1), SLICE_BYTES)
        rows = [
            {
                "id": row_id("weight_statistics", part, layer, module, name, number),
                "part": part,
                "layer": layer,
                "module": module,
                "statistic": name,
                "dtype": dtype,
                "shape": list(array.shape),
                "slice": number,
                "values": data[start : start + SLICE_BYTES].tobytes(),
            }
            for number, start in enumerate(cuts)
        ]
        yield pa.Table.from_pylist(rows, STATISTICS)


class StatisticsTable:
    """The statistics of a table, a layer at a time; parts of the rows are merged.

    Attributes
    ----------
    layers
        Numbers of the layers that it holds, ascending.
    parts
        Numbers of the parts, ascending.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        columns = ["id", "part", "layer"]
        self._ids: dict[int, dict[int, list[npt.NDArray[np.int64]]]] = {}
        for batch in table.batches(columns=columns):
            id_, part, layer = (batch.column(name).to_numpy() for name in columns)
            for number, of in np.unique(np.stack([layer, part]), axis=1).T:
                held = self._ids.setdefault(int(number), {}).setdefault(int(of), [])
                held.append(id_[(layer == number) & (part == of)])
        self.layers = sorted(self._ids)
        self.parts = sorted({part for parts in self._ids.values() for part in parts})

    def layer(self, number: int) -> LayerStatistics:
        """Statistics of one layer over all parts, merged in order of part.

        Raises InputError where the table does not hold the layer, StoreError where a part of it
        or a slice of an array is missing.
        """
        if number not in self._ids:
            raise InputError(
                f"{self._name()}: expected statistics of layer {number}; it holds layers"
                f" {self.layers[0] if self.layers else '-'} to"
                f" {self.layers[-1] if self.layers else '-'}. Are they of the same model?"
            )
        missing = set(self.parts) - set(self._ids[number])
        if missing:
            raise StoreError(
                f"{self._name()}: expected layer {number} of part {min(missing)}, found none."
                " Make the table again."
            )
        merged: LayerStatistics | None = None
        for part in self.parts:
            found = self._part(number, part)
            merged = found if merged is None else merge_statistics(merged, found)
        assert merged is not None
        return merged

    def _part(self, number: int, part: int) -> dict[Key, Tensor]:
        ids = np.concatenate(self._ids[number][part])
        rows = self._table.lookup(ids).to_pylist()
        slices: dict[Key, list[Mapping[str, Any]]] = {}
        for row in rows:
            slices.setdefault((row["module"], row["statistic"]), []).append(row)
        return {key: self._array(key, number, found) for key, found in slices.items()}

    def _array(self, key: Key, layer: int, rows: list[Mapping[str, Any]]) -> Tensor:
        rows = sorted(rows, key=lambda row: row["slice"])
        dtype, shape = np.dtype(_DTYPES[rows[0]["dtype"]]), rows[0]["shape"]
        data = bytearray().join(row["values"] for row in rows)
        if len(data) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise StoreError(
                f"{self._name()}: layer {layer}, {key[0]} {key[1]}: expected {shape} of"
                f" {rows[0]['dtype']}; found {len(data)} bytes. Run `prunery verify` and make the"
                " table again."
            )
        flat = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(flat.reshape(shape))

    def _name(self) -> str:
        return f"statistics `{self._table.manifest.name}` ({self._table.key[:12]})"
