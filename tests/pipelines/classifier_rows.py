"""Labelled data sets of three kinds in a store, and examples in memory."""

import io

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from prunery.pipelines.classifier import Examples
from prunery.pipelines.dataset_tables import DATASET
from prunery.storage import digest, row_id

CENTRES = np.array([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]], np.float32)


def png(pixels):
    """A picture as PNG bytes."""
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG")
    return made.getvalue()


def points(n, seed=0, spread=0.6):
    """(n, 4) float32 around three centres, and their labels."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    return (CENTRES[label] + rng.normal(0, spread, (n, 4))).astype(np.float32), label


def examples(n=60, seed=0, *, ids=None, classes=3, spread=0.6):
    """Features of three classes in memory, all of the train split."""
    x, label = points(n, seed, spread)
    return Examples(
        np.arange(n) + 1000 if ids is None else ids,
        torch.from_numpy(x),
        label,
        np.full(n, -1),
        np.full(n, "train"),
        classes,
        "features",
    )


def pictures(n, size=8, channels=1, seed=0):
    """(n, size, size[, 3]) uint8 pictures of noise with a bright third by class."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    made = rng.integers(0, 60, (n, size, size, channels), dtype=np.uint8)
    for row, code in enumerate(label):
        made[row, code * size // 3 : (code + 1) * size // 3] += 150
    return made[..., 0] if channels == 1 else made, label


def rows_of(kind, n, *, train, contents, label):
    """Rows of the data set's schema."""
    return [
        {
            "id": row_id(kind, row),
            "source": f"rows#{row + 1}",
            "split": "train" if row < train else "test",
            "label": int(label[row]),
            "clean_label": -1,
            "group": "",
            "text": contents[row] if kind == "text" else "",
            "features": contents[row] if kind == "features" else [],
            "image": contents[row] if kind == "image" else b"",
        }
        for row in range(n)
    ]


def write(store, schema, parts, *, step="read_dataset", name=None, inputs=(), notes=None):
    """A table with a shard for each list of rows; its key."""
    options = {"made": digest(repr((parts, notes)))}
    with store.write(
        name=name or step, step=step, schema=schema, inputs=list(inputs), options=options
    ) as writer:
        for number in writer.pending(len(parts)):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(parts[number], schema))
        return writer.commit(notes=notes or {}).key


def write_data(store, rows, *, kind, shape=None, classes=("a", "b", "c"), shards=1, name="data"):
    """A read_dataset table of those rows, cut into shards."""
    size = -(-len(rows) // shards) if rows else 1
    parts = [rows[number * size : (number + 1) * size] for number in range(shards)]
    notes = {"kind": kind, "classes": list(classes), "shape": shape}
    return write(store, DATASET, parts, name=name, notes=notes)


def write_points(store, n=36, *, train=24, shards=2, name="data", seed=0):
    """Features of three classes."""
    x, label = points(n, seed)
    rows = rows_of("features", n, train=train, contents=x.tolist(), label=label)
    return write_data(store, rows, kind="features", shards=shards, name=name), rows
