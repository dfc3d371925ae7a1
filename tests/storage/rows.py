"""Rows that the tests of the store write: every kind of column, the same ones every time."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunery.storage import Manifest, Store, row_ids, schemas


def schema(d: int = 4) -> pa.Schema:
    """An id, text, a score, a reason, a list and a vector."""
    return pa.schema(
        [
            schemas.id_field(),
            pa.field("text", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("reason", schemas.category()),
            pa.field("offsets", pa.list_(pa.int32())),
            pa.field("vector", schemas.vector(d)),
        ]
    )


def rows(shard: int, n: int = 10, salt: str = "", d: int = 4) -> pa.Table:
    """Rows of one shard; another salt gives other rows."""
    rng = np.random.default_rng([shard, n, *salt.encode()])
    texts = [f"{salt}text {shard}-{i}" if i % 7 else None for i in range(n)]
    return pa.table(
        {
            "id": row_ids([f"{salt}{shard}"] * n, list(range(n))),
            "text": pa.array(texts, pa.string()),
            "score": rng.random(n).astype("f4"),
            "reason": pa.array([("kept", "budget")[i % 2] for i in range(n)]).dictionary_encode(),
            "offsets": pa.array([list(range(i % 4)) for i in range(n)], pa.list_(pa.int32())),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(rng.standard_normal(n * d).astype("f4")), type=schemas.vector(d)
            ),
        },
        schema=schema(d),
    )


def arguments(**other: Any) -> dict[str, Any]:
    """Arguments of `Store.write`."""
    return {"name": "chunks", "step": "chunk", "schema": schema(), **other}


def write(store: Store, shards: int = 3, n: int = 10, salt: str = "", **other: Any) -> Manifest:
    """Write a table of so many shards, resuming where an earlier attempt ended."""
    with store.write(**arguments(**other)) as writer:
        for i in writer.pending(shards):
            with writer.shard(i) as shard:
                shard.write(rows(i, n, salt))
        return writer.commit()


def expected(shards: int = 3, n: int = 10, salt: str = "") -> pa.Table:
    """All rows that `write` writes."""
    return pa.concat_tables([rows(i, n, salt) for i in range(shards)])
