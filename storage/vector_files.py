"""The files of a vector index: FAISS's own, the ids, the vectors where they are kept apart, JSON.

Nothing is pickled: `faiss.read_index` parses, the rest are raw numbers and JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from .faiss_threads import load_faiss
from .vector_build import Floats, Kind, Metric, chunks

FORMAT = 1

INDEX, IDS, VECTORS, META = "index.faiss", "ids.i64", "vectors.f32", "index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexMeta:
    """What an index is, as its JSON file says.

    Attributes:
        kind, metric, options: see `VectorIndex.build`.
        rows, d: number and length of the vectors.
        max_norm: largest Euclidean length of a vector, which bounds FAISS's rounding.
        seed, deterministic: of the build.
        faiss: version of the library that built it.
        format: of this description.
    """

    kind: Kind
    metric: Metric
    options: dict[str, int]
    rows: int
    d: int
    max_norm: float
    seed: int
    deterministic: bool
    faiss: str
    format: int = FORMAT


def write_files(folder: Path, meta: IndexMeta, index: Any, vectors: Floats | None) -> list[str]:
    """Write the FAISS file and, where they are not in it, the vectors; return their names."""
    load_faiss().write_index(index, str(folder / INDEX))
    if meta.kind != "ivf,pq" or vectors is None:
        return [INDEX]
    with open(folder / VECTORS, "wb") as file:
        for chunk in chunks(vectors):
            chunk.astype("<f4").tofile(file)
    return [INDEX, VECTORS]


def open_files(
    meta: IndexMeta, file: Path, ids: int, vectors: Path | None, mmap: bool
) -> tuple[Any, Floats | None]:
    """Read the FAISS index and its vectors.

    Raises:
        StoreError: the file is no FAISS index, or not of the rows, length and metric of `meta`.
    """
    faiss = load_faiss()
    if meta.format != FORMAT:
        raise StoreError(
            f"{file}: expected index format {FORMAT}, found {meta.format}; build it again"
        )
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except RuntimeError as error:
        raise StoreError(
            f"{file}: expected a FAISS index, found: {error}; build the index again"
        ) from error
    how = faiss.METRIC_INNER_PRODUCT if meta.metric == "ip" else faiss.METRIC_L2
    found = (index.ntotal, index.d, index.metric_type, ids)
    if found != (expected := (meta.rows, meta.d, how, meta.rows)):
        raise StoreError(
            f"{file}: expected (rows, d, metric, ids) of {expected}, found {found}; "
            "build the index again"
        )
    if meta.kind != "ivf,pq":
        return index, stored_vectors(index, meta)
    return index, map_vectors(vectors, meta, mmap)


def stored_vectors(index: Any, meta: IndexMeta) -> Floats:
    """Return the (N, d) vectors inside a flat index or a graph, without a copy."""
    faiss = load_faiss()
    if meta.rows == 0:
        return np.empty((0, meta.d), np.float32)
    flat = index if meta.kind == "flat" else faiss.downcast_index(index.storage)
    view: Floats = faiss.rev_swig_ptr(flat.get_xb(), meta.rows * meta.d)
    return view.reshape(meta.rows, meta.d)


def map_vectors(path: Path | None, meta: IndexMeta, mmap: bool) -> Floats | None:
    """Return the (N, d) vectors of a file, mapped or read; None where none were kept."""
    if path is None:
        return None
    shape = (meta.rows, meta.d)
    if path.stat().st_size != 4 * meta.rows * meta.d:
        raise StoreError(
            f"{path}: expected {4 * meta.rows * meta.d} bytes of vectors, found "
            f"{path.stat().st_size}; build the index again"
        )
    if mmap:
        return np.memmap(path, "<f4", "r", shape=shape)
    return np.fromfile(path, "<f4").reshape(shape)
