"""Schemas of the tables about a labelled data set: rows, training dynamics, outputs, decisions.

All but the dynamics are keyed by the row's id; the later ones are sidecars of the first. The
manifest of the rows has in its notes `kind` (image, text or features), `classes` (names, in the
order of their codes) and, for images, `shape` ([channels, height, width]).
"""

from __future__ import annotations

import pyarrow as pa

from .columns import required
from .decisions import SCHEMA


def _wide(name: str, size: int, kind: pa.DataType | None = None) -> pa.Field:
    element = pa.field("element", kind or pa.float32(), nullable=False)
    return required(name, pa.list_(element, size))


TRAIN, TEST = "train", "test"

DATASET = pa.schema(
    [
        required("id", pa.int64()),
        required("source", pa.string()),  # file#row, row from 1; or the file of an image
        required("split", pa.string()),  # train or test
        required("label", pa.int32()),  # code of the class, from 0
        required("clean_label", pa.int32()),  # before noise was planted; -1 where none was
        required("group", pa.string()),  # "" where no group field was named
        required("text", pa.string()),  # "" for another kind
        required("features", pa.list_(pa.float32())),  # empty for another kind
        required("image", pa.binary()),  # PNG or JPEG; empty for another kind
    ]
)
# One row for a sample after an epoch of a run; rows of an epoch stand in one shard.
DYNAMICS = pa.schema(
    [
        required("id", pa.int64()),
        required("sample", pa.int64()),
        required("run", pa.int32()),  # from 0
        required("epoch", pa.int32()),  # from 0
        required("true_probability", pa.float32()),
        required("margin", pa.float32()),  # logits
        required("correct", pa.bool_()),
        required("loss", pa.float32()),  # nats
        required("el2n", pa.float32()),
        pa.field("probability_change", pa.float32()),  # since the epoch before; null in the first
        pa.field("gradient_norm", pa.float32()),  # null where it was not asked for
        required("logits", pa.list_(pa.float32())),  # empty where they were not asked for
    ]
)
CLUSTERS = pa.schema(
    [
        required("id", pa.int64()),
        required("cluster", pa.int32()),
        required("centroid_distance", pa.float32()),  # 1 - cosine
    ]
)
SHAPLEY = pa.schema([required("id", pa.int64()), required("shapley", pa.float32())])
DATASET_DECISION = pa.schema([*SCHEMA, required("weight", pa.float32())])


def outputs(classes: int, d: int) -> pa.Schema:
    """What a trained classifier says of each row: log probabilities, and its last features."""
    return pa.schema(
        [
            required("id", pa.int64()),
            _wide("log_probability", classes),  # nats, natural order of the classes
            _wide("embedding", d),  # unit vector: what enters the last layer
        ]
    )


def neighbours(k: int) -> pa.Schema:
    """The k nearest other rows of each row, nearest first; id -1 where there are fewer."""
    return pa.schema(
        [
            required("id", pa.int64()),
            _wide("neighbour", k, pa.int64()),
            _wide("neighbour_distance", k),  # Euclidean, of unit vectors
        ]
    )


# One row for a student: a fraction of the rows, how they were taken, with or without a teacher.
STUDENTS = pa.schema(
    [
        required("id", pa.int64()),
        required("fraction", pa.float32()),  # share of the training rows kept
        required("selection", pa.string()),  # random, chosen or full
        required("distilled", pa.bool_()),
        required("seed", pa.int32()),
        required("alpha", pa.float32()),  # weight of the teacher's part of the loss
        required("temperature", pa.float32()),
        required("rows", pa.int32()),
        required("steps", pa.int32()),  # of the optimiser
        required("accuracy", pa.float32()),  # on the test split
        required("worst_class_accuracy", pa.float32()),
    ]
)
# One row for a short training with one alpha.
ALPHAS = pa.schema(
    [
        required("id", pa.int64()),
        required("fraction", pa.float32()),
        required("selection", pa.string()),
        required("alpha", pa.float32()),
        required("accuracy", pa.float32()),  # on the held-out part of the kept rows
        required("seed", pa.int32()),
        required("used", pa.bool_()),  # the alpha that the students of this line are trained with
    ]
)
# One row for a score: how well it finds labels that are known to be wrong.
NOISE = pa.schema(
    [
        required("id", pa.int64()),
        required("score", pa.string()),
        required("higher_is", pa.string()),  # harder
        required("auc", pa.float32()),  # NaN where no label, or every label, is wrong
        required("found", pa.int32()),  # wrong labels among the rows looked at
        required("planted", pa.int32()),
        required("looked", pa.int32()),  # the hardest rows, as many as were planted
    ]
)
