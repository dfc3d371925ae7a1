"""Building FAISS indexes: checked input, deterministic training, bounded memory."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .faiss_threads import faiss_threads
from .rowhash import mix64

Kind = Literal["flat", "hnsw", "ivf,pq"]
Metric = Literal["ip", "l2"]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

# "auto": exact search up to the first number of rows, a graph up to the second. At a million
# rows of 384 numbers a flat index is 1.5 GB and a query reads all of it; a graph adds about
# 0.3 kB a row and needs everything in memory; above ten million neither fits most machines.
FLAT_UP_TO = 1_000_000
HNSW_UP_TO = 10_000_000

_CHUNK_ROWS = 65_536
_PQ_CODES = 256  # 8 bits for each sub-vector

DEFAULTS: dict[str, dict[str, Any]] = {
    "flat": {},
    # M: links a row; ef: length of the candidate list while building and searching
    "hnsw": {"M": 32, "ef_construction": 200, "ef_search": 128},
    # nlist, m: 0 lets the size decide; nprobe: lists looked into; rerank: keep the vectors
    # beside the codes and take the exact scores of the best `rerank` times k candidates (0: no)
    "ivf,pq": {"nlist": 0, "m": 0, "nprobe": 32, "rerank": 8},
}


@dataclass(slots=True)
class Rows:
    """Vectors with their ids, in memory or in a temporary file that lives as long as this."""

    vectors: Floats  # (N, d)
    ids: Ids  # (N,)
    spool: Any = field(default=None, repr=False)

    @property
    def max_norm(self) -> float:
        """Largest Euclidean length of a vector, 0 where there is none."""
        norms = [
            float(np.sqrt((chunk.astype(np.float64) ** 2).sum(axis=1).max()))
            for chunk in chunks(self.vectors)
        ]
        return max(norms, default=0.0)


def chunks(vectors: Floats) -> Iterator[Floats]:
    """Give consecutive rows, at most 65,536 at a time, contiguous in memory."""
    for start in range(0, len(vectors), _CHUNK_ROWS):
        yield np.ascontiguousarray(vectors[start : start + _CHUNK_ROWS])


def gather(vectors: Any, ids: Any) -> Rows:
    """Check the input of a build; batches are put into a temporary file, not into memory.

    Raises:
        InputError: wrong shape or type, lengths that differ, an id twice or negative, or a
            number that is not finite, with its place.
    """
    if ids is None:
        if isinstance(vectors, np.ndarray):
            raise InputError("expected ids with an array of vectors, found none")
        return _spool(vectors)
    rows = Rows(checked_vectors(vectors, 0), _checked_ids(ids))
    if len(rows.vectors) != len(rows.ids):
        raise InputError(
            f"expected one id for each vector, found {len(rows.vectors)} vectors and "
            f"{len(rows.ids)} ids"
        )
    _check_unique(rows.ids)
    return rows


def checked_vectors(vectors: Any, first_row: int, d: int | None = None) -> Floats:
    """Return the vectors as (N, d) float32.

    Raises:
        InputError: another shape or type, or a number that is not finite (rows are counted
            from `first_row`).
    """
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.shape[1] < 1:
        shape = getattr(vectors, "shape", type(vectors).__name__)
        raise InputError(f"expected vectors as an array of shape (N, d), found {shape}")
    if vectors.dtype not in (np.float32, np.float16):
        raise InputError(
            f"expected vectors of float32 (or float16), found {vectors.dtype}; use .astype"
        )
    if d is not None and vectors.shape[1] != d:
        raise InputError(f"expected vectors of {d} numbers as before, found {vectors.shape[1]}")
    for i, chunk in enumerate(chunks(vectors)):
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            row = first_row + i * _CHUNK_ROWS + int(np.argmin(finite))
            raise InputError(f"expected finite numbers, found NaN or infinity in vector {row}")
    return np.asarray(vectors, dtype=np.float32)


def _checked_ids(ids: Any) -> Ids:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(
            f"expected row ids as integers of shape (N,), found {array.dtype} {array.shape}"
        )
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        raise InputError(f"expected row ids >= 0, found {array.min()} at {int(array.argmin())}")
    return array


def _check_unique(ids: Ids) -> None:
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise InputError(
            f"expected every row id once in an index, found {len(twice)} again, "
            f"e.g. {int(twice[0])}; drop exact duplicates first"
        )


def _spool(batches: Iterable[tuple[Any, Any]]) -> Rows:
    folder = tempfile.TemporaryDirectory(prefix="prunery-index-")
    path = Path(folder.name, "vectors.f32")
    ids: list[Ids] = []
    rows, d = 0, None
    with open(path, "wb") as file:
        for batch_ids, batch in batches:
            part = checked_vectors(batch, rows, d)
            ids.append(_checked_ids(batch_ids))
            if len(ids[-1]) != len(part):
                raise InputError(
                    f"expected one id for each vector, found {len(part)} vectors and "
                    f"{len(ids[-1])} ids in the batch from row {rows}"
                )
            part.tofile(file)
            rows, d = rows + len(part), part.shape[1]
    if d is None:
        raise InputError("expected at least one batch of (ids, vectors), found none")
    shape = (rows, d)
    vectors = np.memmap(path, np.float32, "r", shape=shape) if rows else np.empty(shape, "f4")
    out = Rows(vectors, np.concatenate(ids), folder)
    _check_unique(out.ids)
    return out


def choose(kind: str, n: int) -> Kind:
    """Return the kind of index for n rows.

    Raises:
        InputError: an unknown kind.
    """
    if kind == "auto":
        return "flat" if n <= FLAT_UP_TO else "hnsw" if n <= HNSW_UP_TO else "ivf,pq"
    for known in ("flat", "hnsw", "ivf,pq"):
        if kind == known:
            return known
    raise InputError(f"expected a kind among auto, flat, hnsw and ivf,pq, found {kind!r}")


def settings(kind: Kind, options: Mapping[str, int], n: int, d: int) -> dict[str, int]:
    """Fill in the options of a kind.

    Raises:
        InputError: an unknown option, one out of range, or too few rows to train on.
    """
    known = DEFAULTS[kind]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"expected options of {kind!r} among {sorted(known)}, found {unknown}")
    out: dict[str, int] = {**known, **options}
    for name, value in out.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"expected {name} to be a number of at least 0, found {value!r}")
    if kind == "ivf,pq":
        _settle_ivf(out, n, d)
    for name in set(out) - {"rerank"}:
        if out[name] < 1:
            raise InputError(f"expected {name} to be at least 1, found {out[name]}")
    return out


def _settle_ivf(out: dict[str, int], n: int, d: int) -> None:
    if n < _PQ_CODES:
        raise InputError(
            f"expected at least {_PQ_CODES} rows to train an 'ivf,pq' index, found {n}; "
            "use kind='flat' (or 'auto')"
        )
    # 39 training rows a centroid is the least that FAISS is content with
    out["nlist"] = out["nlist"] or max(1, min(round(4 * math.sqrt(n)), n // 39))
    # four numbers in a byte where d allows: the largest divisor of d up to d / 4
    out["m"] = out["m"] or max(m for m in range(1, max(1, d // 4) + 1) if d % m == 0)
    if out["nlist"] > n:
        raise InputError(f"expected nlist to be at most the {n} rows, found {out['nlist']}")
    if d % out["m"]:
        raise InputError(f"expected m to divide the vector length {d}, found {out['m']}")
    out["nprobe"] = min(out["nprobe"], out["nlist"])


def build(
    rows: Rows,
    kind: Kind,
    metric: Metric,
    options: Mapping[str, int],
    *,
    seed: int,
    deterministic: bool,
    threads: int | None,
) -> Any:
    """Return the FAISS index of the rows, positions 0 … N-1 in their order."""
    # The links of a graph depend on which row came first, so several threads race.
    alone = kind == "hnsw" and deterministic
    with faiss_threads(1 if alone else threads) as faiss:
        d = rows.vectors.shape[1]
        index = _empty(faiss, kind, d, metric, options, seed)
        if kind == "ivf,pq":
            index.train(_training_rows(rows, options, seed))
        for chunk in chunks(rows.vectors):
            index.add(chunk)
    return index


def _empty(
    faiss: Any, kind: Kind, d: int, metric: Metric, options: Mapping[str, int], seed: int
) -> Any:
    how = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    if kind == "flat":
        return faiss.IndexFlat(d, how)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(d, options["M"], how)
        index.hnsw.rng = faiss.RandomGenerator(seed % 2**31)
        index.hnsw.efConstruction = options["ef_construction"]
        index.hnsw.efSearch = options["ef_search"]
        return index
    coarse = faiss.IndexFlat(d, how)
    index = faiss.IndexIVFPQ(coarse, d, options["nlist"], options["m"], 8, how)
    index.cp.seed = index.pq.cp.seed = seed % 2**31
    # few rows in a named 'ivf,pq' are the caller's choice, not worth a warning on stderr
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    index.nprobe = options["nprobe"]
    return index


def _training_rows(rows: Rows, options: Mapping[str, int], seed: int) -> Floats:
    """A sample for k-means, chosen by the hash of (seed, id): the order of rows is no matter."""
    wanted = 256 * max(options["nlist"], _PQ_CODES)
    if len(rows.ids) <= wanted:
        return np.ascontiguousarray(rows.vectors)
    salt = mix64(np.array([seed % 2**64], dtype=np.uint64))
    order = np.argsort(mix64(rows.ids.astype(np.uint64) ^ salt), kind="stable")
    return np.ascontiguousarray(rows.vectors[np.sort(order[:wanted])])
