"""Run as a script: pass a table through the store and say how much memory that took.

    streamer.py write|read FOLDER MEGABYTES

Prints the growth of the process's peak memory while it worked, and the bytes that passed.
"""

import json
import sys

import numpy as np
import pyarrow as pa

from prunery.storage import Store, schemas
from prunery.storage.environment import peak_memory_bytes

D = 384
BATCH = 2048  # 3 MiB


def schema() -> pa.Schema:
    return pa.schema([schemas.id_field(), pa.field("vector", schemas.vector(D))])


def batch(i: int, noise: np.ndarray) -> pa.RecordBatch:
    ids = pa.array(np.arange(i * BATCH, (i + 1) * BATCH))
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(noise + np.float32(i)), type=schemas.vector(D)
    )
    return pa.record_batch([ids, values], schema=schema())


def write(store: Store, batches: int) -> int:
    noise = np.random.default_rng(0).standard_normal(BATCH * D).astype("f4")
    with store.write(name="vectors", step="embed", schema=schema()) as writer:
        for i in writer.pending(1):
            with writer.shard(i) as shard:
                for j in range(batches):
                    shard.write(batch(j, noise))
        return writer.commit().bytes


def read(store: Store) -> int:
    total = 0
    for found in store.table("vectors").batches():
        total += found.nbytes
    return total


def main() -> None:
    mode, folder, megabytes = sys.argv[1:]
    store = Store(folder)
    # the libraries, loaded and warm
    batch(0, np.zeros(BATCH * D, np.float32))
    small = Store(f"{folder}-warm")
    write(small, 1)
    read(small)
    before = peak_memory_bytes()
    passed = read(store) if mode == "read" else write(store, int(megabytes) // 3)
    sys.stdout.write(json.dumps({"growth": peak_memory_bytes() - before, "bytes": passed}))


if __name__ == "__main__":
    main()
