"""Signals of the contract to columns of a table, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..pruners.contract import SIGNALS, Array, Pruner, Signals
from .tables import vectors_of


def columns_for(pruner: Pruner, present: Sequence[str]) -> list[str]:
    """Columns that hold what a method needs, and what it can use among those present.

    A ragged signal is one list column, which implies its borders.
    """
    optional = set(pruner.optional) & set(present)
    borders = {spec.ragged_by for spec in SIGNALS.values()}
    return sorted({"id", *pruner.needs, *optional} - borders)


def signals_from(rows: pa.Table, columns: Sequence[str]) -> Signals:
    """The named columns as signals; list columns bring their borders with them."""
    arrays: dict[str, Array] = {}
    for name in columns:
        column = rows.column(name)
        spec = SIGNALS.get(name)
        if spec is not None and spec.shape == "N,d":
            arrays[name] = vectors_of(column)
        elif spec is not None and spec.ragged_by:
            offsets, values = _ragged(column, np.dtype(spec.dtype))
            arrays[name] = values
            arrays[spec.ragged_by] = offsets
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return Signals(arrays)


def _ragged(column: pa.ChunkedArray, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
    offsets = [np.zeros(1, np.int64)]
    values: list[Array] = []
    for chunk in column.chunks:
        lengths = chunk.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        offsets.append(offsets[-1][-1] + np.cumsum(lengths))
        values.append(chunk.flatten().to_numpy(zero_copy_only=False))
    return np.concatenate(offsets), (np.concatenate(values) if values else np.zeros(0, dtype))
