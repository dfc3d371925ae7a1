"""Columns of the tables' schemas."""

from __future__ import annotations

import pyarrow as pa


def required(name: str, kind: pa.DataType) -> pa.Field:
    """A column without nulls, which most are; where one may be null, `pa.field` says so."""
    return pa.field(name, kind, nullable=False)
