"""Nearest neighbours over row ids: FAISS finds candidates, exact arithmetic ranks them."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, StoreError
from . import vector_build
from .faiss_threads import faiss_threads, load_faiss
from .ids import canonical_json, file_digest
from .vector_build import Floats, Ids, Metric
from .vector_files import (
    IDS,
    INDEX,
    META,
    VECTORS,
    IndexMeta,
    open_files,
    stored_vectors,
    write_files,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from .manifest import Manifest
    from .store import Store
    from .table import Table
    from .writer import TableWriter

# Candidates beyond k, so that a tie at the k-th place is usually seen in one search.
_MARGIN = 16
# Past this many candidates a query with a tie is answered by going through all vectors.
_MOST_CANDIDATES = 4096
# Rows scored at once take this much memory, in bytes of float64.
_SCORE_BYTES = 64 << 20


class VectorIndex:
    """Vectors under row ids, searched by inner product or Euclidean distance.

    Scores do not come from FAISS: its candidates are scored again in float64 from the stored
    vectors and rounded to float32, so a score is the same for every kind of index, number of
    threads and size of batch, and equal vectors tie exactly. Ties go to the smaller id.

    - `flat` is exact: the k best by (score, id), a tie at the k-th place included.
    - `hnsw` and `ivf,pq` may miss neighbours; what they find has exact scores. Only an
      `ivf,pq` built with `rerank=0` keeps no vectors and gives the scores of its codes.

    For cosine similarity normalise vectors and queries and use `ip`.
    """

    def __init__(self, meta: IndexMeta, index: Any, ids: Ids, vectors: Floats | None) -> None:
        """Made by `build`, `load` and `from_table`."""
        self.meta = meta
        self.ids = ids
        self._index = index
        self._vectors = vectors
        self._spool: Any = None

    def __repr__(self) -> str:
        m = self.meta
        return f"VectorIndex({m.kind!r}, {m.metric!r}, {m.rows} x {m.d})"

    def __len__(self) -> int:
        return self.meta.rows

    # -- building ------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        vectors: "NDArray[Any] | Iterable[tuple[Any, Any]]",
        ids: "NDArray[Any] | Iterable[int] | None" = None,
        *,
        kind: str = "auto",
        metric: Metric = "ip",
        seed: int = 0,
        deterministic: bool = True,
        threads: int | None = None,
        options: Mapping[str, int] | None = None,
    ) -> "VectorIndex":
        """Build an index.

        Args:
            vectors: (N, d) float32 (or float16), or batches of (ids, vectors), which are put
                into a temporary file and so may be more than fits into memory.
            ids: (N,) row ids, each once; None with batches.
            kind: `flat`, `hnsw`, `ivf,pq`, or `auto`: flat up to a million rows, hnsw up to
                ten million, ivf,pq above.
            metric: `ip`, inner product, higher is nearer; `l2`, squared Euclidean distance,
                lower is nearer.
            seed: of k-means, its sample, and the levels of the graph.
            deterministic: build a graph with one thread, since its links depend on the order
                in which rows arrive. The other kinds are deterministic with any number.
            threads: None for `PRUNERY_FAISS_THREADS`, else the CPUs of this process.
            options: hnsw: `M` (32), `ef_construction` (200), `ef_search` (128).
                ivf,pq: `nlist` (4 √N), `m` (about d / 4 bytes a vector), `nprobe` (32),
                `rerank` (8; 0 keeps no vectors).

        Raises:
            InputError: anything about the input, with the row or value at fault.
        """
        if metric not in get_args(Metric):
            raise InputError(f"expected a metric among {get_args(Metric)}, found {metric!r}")
        rows = vector_build.gather(vectors, ids)
        n, d = rows.vectors.shape
        chosen = vector_build.choose(kind, n)
        filled = vector_build.settings(chosen, options or {}, n, d)
        index = vector_build.build(
            rows, chosen, metric, filled, seed=seed, deterministic=deterministic, threads=threads
        )
        meta = IndexMeta(
            kind=chosen, metric=metric, options=filled, rows=n, d=d, max_norm=rows.max_norm,
            seed=seed, deterministic=deterministic, faiss=load_faiss().__version__,
        )  # fmt: skip
        if chosen != "ivf,pq":
            return cls(meta, index, rows.ids, stored_vectors(index, meta))
        out = cls(meta, index, rows.ids, rows.vectors if filled["rerank"] else None)
        out._spool = rows.spool  # the vectors' temporary file lives as long as the index
        return out

    # -- searching -----------------------------------------------------------------------------

    def search(
        self, queries: NDArray[Any], k: int, *, threads: int | None = None
    ) -> tuple[Ids, Floats]:
        """Return the k nearest rows of each query, best first.

        Args:
            queries: (Q, d) float32 or float16.
            k: how many.
            threads: as in `build`.

        Returns:
            ids (Q, k) int64 and scores (Q, k) float32: inner product, higher is nearer, or
            squared distance, lower is nearer. Where k exceeds the rows, ids of -1 with a
            score of -inf (`ip`) or +inf (`l2`).

        Raises:
            InputError: wrong shape or type, a number that is not finite, k below 1.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"expected k to be at least 1, found {k!r}")
        vectors = vector_build.checked_vectors(queries, 0, self.meta.d)
        worst = -np.inf if self.meta.metric == "ip" else np.inf
        ids = np.full((len(vectors), k), -1, np.int64)
        scores = np.full((len(vectors), k), worst, np.float32)
        if self.meta.rows and len(vectors):
            with faiss_threads(threads):
                positions, found = self._nearest(vectors, min(k, self.meta.rows))
            taken = found.shape[1]
            ids[:, :taken] = np.where(positions < 0, -1, self.ids[positions])
            scores[:, :taken] = np.where(positions < 0, worst, found)
        return ids, scores

    def _nearest(self, queries: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
        """Positions and scores of the best k, k <= N, -1 where an index finds fewer."""
        many = self._candidates_for(k)
        approximate, positions = self._search(queries, many)
        short = (positions >= 0).sum(axis=1) < k
        if short.any():  # a graph in pieces, or lists with too few rows
            approximate[short], positions[short] = self._search_wide(queries[short], many)
        if self._vectors is None:
            return self._ranked(positions, self._toward(approximate.astype(np.float64)), k)
        exact = self._exact(queries, positions)
        best, scores = self._ranked(positions, exact, k)
        if self.meta.kind == "flat" and many < self.meta.rows:
            for row in self._open_ties(queries, scores[:, -1], approximate[:, -1]):
                best[row], scores[row] = self._settle_tie(queries[row], k, 4 * many)
        return best, scores

    def _candidates_for(self, k: int) -> int:
        factor = max(1, self.meta.options.get("rerank", 1))
        return min(self.meta.rows, k * factor + _MARGIN)

    def _search(self, queries: Floats, many: int, **wide: int) -> tuple[Floats, Ids]:
        """FAISS's own scores (Q, many) and positions (Q, many)."""
        faiss = load_faiss()
        options = self.meta.options
        parameters = None
        if self.meta.kind == "hnsw":
            ef = wide.get("ef", max(options["ef_search"], many))
            parameters = faiss.SearchParametersHNSW(efSearch=ef)
        elif self.meta.kind == "ivf,pq":
            parameters = faiss.SearchParametersIVF(nprobe=wide.get("nprobe", options["nprobe"]))
        scores, positions = self._index.search(
            np.ascontiguousarray(queries), many, params=parameters
        )
        return scores, positions

    def _search_wide(self, queries: Floats, many: int) -> tuple[Floats, Ids]:
        """Search again for queries that found fewer than k rows, leaving nothing out."""
        if self.meta.kind == "ivf,pq":
            return self._search(queries, many, nprobe=self.meta.options["nlist"])
        scores = np.empty((len(queries), many), np.float32)
        positions = np.empty((len(queries), many), np.int64)
        for i, query in enumerate(queries):
            positions[i], toward = self._through_all(query, many)
            scores[i] = self._toward(toward)
        return scores, positions

    # -- exact scores and ties -----------------------------------------------------------------

    def _toward(self, scores: NDArray[Any]) -> NDArray[Any]:
        """Turn scores so that higher is nearer (its own inverse)."""
        return scores if self.meta.metric == "ip" else -scores

    def _exact(self, queries: Floats, positions: Ids) -> NDArray[np.float64]:
        """(Q, C) exact scores of candidates, higher nearer, -inf where the position is -1."""
        out = np.empty(positions.shape, np.float64)
        step = max(1, _SCORE_BYTES // (8 * self.meta.d * max(1, positions.shape[1])))
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            out[block] = self._score(queries[block, None, :], self._rows(positions[block]))
        out[positions < 0] = -np.inf
        return out

    def _rows(self, positions: Ids) -> Floats:
        if self._vectors is None:
            raise StoreError(f"{self!r}: expected stored vectors, found an index without")
        return self._vectors[positions]

    def _score(self, queries: Floats, vectors: Floats) -> NDArray[np.float64]:
        """Inner product or minus squared distance along the last axis, in float64.

        A product and a pairwise sum, not BLAS: the same two vectors give the same bits
        wherever they stand.
        """
        wide = queries.astype(np.float64)
        terms = wide * vectors if self.meta.metric == "ip" else -np.square(wide - vectors)
        total: NDArray[np.float64] = terms.sum(axis=-1)
        return total

    def _ranked(self, positions: Ids, toward: NDArray[np.float64], k: int) -> tuple[Ids, Floats]:
        """The best k of the candidates by (float32 score, id)."""
        rounded = toward.astype(np.float32)
        order = np.lexsort((self.ids[positions], -rounded), axis=1)[:, :k]
        best = np.take_along_axis(positions, order, axis=1)
        scores = np.take_along_axis(rounded, order, axis=1)
        return best, self._toward(scores)

    def _open_ties(self, queries: Floats, kth: Floats, last: Floats) -> list[int]:
        """Queries for which a row that FAISS left out might reach the k-th score.

        FAISS computes in float32: each of about d operations is off by up to 2^-24 of the
        largest sum that can occur.
        """
        norms = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
        if self.meta.metric == "ip":
            size = norms * self.meta.max_norm
        else:
            size = np.square(norms + self.meta.max_norm)
        error = (self.meta.d + 4) * 2.0**-24 * size
        reach = (self._toward(last.astype(np.float64)) + error).astype(np.float32)
        limit = self._toward(kth)
        return [int(row) for row in np.flatnonzero(reach >= limit)]

    def _settle_tie(self, query: Floats, k: int, many: int) -> tuple[Ids, Floats]:
        """Widen one exact search until the k-th place is certain."""
        single = query[None, :]
        while many < min(self.meta.rows, _MOST_CANDIDATES):
            approximate, positions = self._search(single, many)
            best, scores = self._ranked(positions, self._exact(single, positions), k)
            if not self._open_ties(single, scores[:, -1], approximate[:, -1]):
                return best[0], scores[0]
            many *= 4
        positions, toward = self._through_all(query, k)
        return positions, self._toward(toward)

    def _through_all(self, query: Floats, k: int) -> tuple[Ids, Floats]:
        """Positions and scores (higher nearer) of the best k by going through every vector."""
        toward = np.empty(self.meta.rows, np.float32)
        step = max(1, _SCORE_BYTES // (8 * self.meta.d))
        for start in range(0, self.meta.rows, step):
            rows = self._rows(np.arange(start, min(start + step, self.meta.rows)))
            toward[start : start + step] = self._score(query[None, :], rows)
        order = np.lexsort((self.ids, -toward))[:k]
        return order, toward[order]

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as a new folder: FAISS file, ids, vectors where kept, JSON with digests.

        Raises:
            InputError: something is there already.
            StoreError: the folder cannot be written.
        """
        target = Path(path)
        if target.exists():
            raise InputError(f"expected no file or folder at {target}, found one; remove it first")
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            unfinished.mkdir(parents=True)
            files = write_files(unfinished, self.meta, self._index, self._vectors)
            self.ids.astype("<i8").tofile(unfinished / IDS)
            sha256 = {name: file_digest(unfinished / name) for name in [*files, IDS]}
            description = {"meta": asdict(self.meta), "sha256": sha256}
            (unfinished / META).write_bytes(canonical_json(description))
            os.rename(unfinished, target)
        except (OSError, RuntimeError) as error:  # FAISS says RuntimeError
            raise StoreError(
                f"{target}: expected to write an index, found: {error}; mend that and save again"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], mmap: bool = True, check: bool = True
    ) -> "VectorIndex":
        """Open what `save` wrote. Nothing is unpickled.

        Args:
            path: the folder.
            mmap: map the files; rows are read when a search touches them.
            check: compare the SHA-256 of every file first, which reads them once.

        Raises:
            StoreError: a file is missing or altered, or the index is not what its JSON says.
        """
        folder = Path(path)
        try:
            description = json.loads((folder / META).read_bytes())
            meta = IndexMeta(**description["meta"])
            for name, expected in description["sha256"].items():
                if check and (found := file_digest(folder / name)) != expected:
                    raise StoreError(
                        f"{folder / name}: expected SHA-256 {expected}, found {found}; "
                        "build the index again"
                    )
            ids = np.fromfile(folder / IDS, "<i8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder}: expected a saved index ({META}, {INDEX}, {IDS}), found: {error}; "
                "build the index again"
            ) from error
        vectors = folder / VECTORS if VECTORS in description["sha256"] else None
        index, mapped = open_files(meta, folder / INDEX, len(ids), vectors, mmap)
        return cls(meta, index, ids, mapped)

    # -- in a store ----------------------------------------------------------------------------

    @staticmethod
    def schema() -> "pa.Schema":
        """Return the schema of an index in a store: its rows are the ids in index order."""
        import pyarrow as pa

        from . import schemas

        return pa.schema([schemas.id_field()])

    def write_to(self, writer: "TableWriter") -> None:
        """Put the index into a writer of kind `index` and schema `VectorIndex.schema()`.

        The ids become the rows, the files attachments. Commit afterwards.
        """
        import pyarrow as pa

        for i in writer.pending(1):
            with writer.shard(i) as shard:
                for start in range(0, len(self.ids), 1 << 20):
                    ids = pa.array(self.ids[start : start + (1 << 20)])
                    shard.write(pa.record_batch([ids], schema=self.schema()))
        if writer.committed:
            return
        folder = writer.scratch(uuid.uuid4().hex)
        try:
            for name in write_files(folder, self.meta, self._index, self._vectors):
                writer.attach(name, folder / name, move=True)
        except RuntimeError as error:
            raise StoreError(
                f"expected to write a FAISS file, found: {error}; mend that and run again"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        writer.attach(META, canonical_json({"meta": asdict(self.meta)}))

    def save_to(
        self,
        store: "Store",
        *,
        name: str,
        step: str = "index",
        version: int = 1,
        options: Mapping[str, Any] | None = None,
        inputs: Iterable[str] = (),
        models: Mapping[str, str] | None = None,
    ) -> "Manifest":
        """Commit the index to a store. Its kind, metric, options and seed go into the key."""
        own = {"kind": self.meta.kind, "metric": self.meta.metric, "index": self.meta.options}
        with store.write(
            name=name, step=step, version=version, options={**own, **(options or {})},
            inputs=list(inputs), models=models, seed=self.meta.seed, schema=self.schema(),
            kind="index",
        ) as writer:  # fmt: skip
            self.write_to(writer)
            return writer.commit(notes={"index": asdict(self.meta)})

    @classmethod
    def from_table(cls, table: "Table", mmap: bool = True, check: bool = True) -> "VectorIndex":
        """Open an index in a store, as `load` does from a folder.

        Raises:
            InputError: the table is no index.
            StoreError: as in `load`.
        """
        listed = {item["name"]: item["sha256"] for item in table.manifest.attachments}
        if table.manifest.kind != "index" or not {INDEX, META} <= set(listed):
            raise InputError(
                f"expected a table of kind 'index', found {table!r} of kind {table.manifest.kind!r}"
            )
        paths = {name: table.attachment(name) for name in listed}
        for name, path in paths.items():
            if check and (found := file_digest(path)) != listed[name]:
                raise StoreError(
                    f"{path}: expected SHA-256 {listed[name]}, found {found}; "
                    "remove the table and run its step again"
                )
        meta = IndexMeta(**json.loads(paths[META].read_bytes())["meta"])
        ids = np.asarray(table.to_table(["id"]).column("id")).astype(np.int64)
        index, vectors = open_files(meta, paths[INDEX], len(ids), paths.get(VECTORS), mmap)
        return cls(meta, index, ids, vectors)
