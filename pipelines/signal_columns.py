"""Signals of the contract to columns of a table, and back."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from ..pruners.contract import SIGNALS, Array, Pruner, Signals
from .tables import flat, vectors_of


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
            arrays[spec.ragged_by], arrays[name] = flat(column)
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return Signals(arrays)
