"""Parquet tables, FAISS indexes and their manifests.

The names below are loaded when they are first used, so that importing this package loads
neither Arrow nor FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import schemas
    from .ids import canonical_json, digest, file_digest, row_id, row_ids
    from .kmeans import nearest_centres, spherical_kmeans
    from .manifest import Manifest
    from .shard import ShardWriter
    from .store import Store
    from .table import Table
    from .upkeep import GcItem, GcReport, Problem
    from .vector_index import VectorIndex
    from .writer import TableWriter

__all__ = [
    "GcItem",
    "GcReport",
    "Manifest",
    "Problem",
    "ShardWriter",
    "Store",
    "Table",
    "TableWriter",
    "VectorIndex",
    "canonical_json",
    "digest",
    "file_digest",
    "nearest_centres",
    "row_id",
    "row_ids",
    "schemas",
    "spherical_kmeans",
]

_HOME = {
    "GcItem": ".upkeep",
    "GcReport": ".upkeep",
    "Manifest": ".manifest",
    "Problem": ".upkeep",
    "ShardWriter": ".shard",
    "Store": ".store",
    "Table": ".table",
    "TableWriter": ".writer",
    "VectorIndex": ".vector_index",
    "canonical_json": ".ids",
    "digest": ".ids",
    "file_digest": ".ids",
    "nearest_centres": ".kmeans",
    "row_id": ".ids",
    "row_ids": ".ids",
    "spherical_kmeans": ".kmeans",
}


def __getattr__(name: str) -> Any:
    if name == "schemas":
        return import_module(".schemas", __name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
