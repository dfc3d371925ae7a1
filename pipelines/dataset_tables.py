"""Schemas of the tables about a labelled data set: rows, training dynamics, outputs, decisions.

All but the dynamics are keyed by the row's id; the later ones are sidecars of the first. The
manifest of the rows has in its notes `kind` (image, text or features), `classes` (names, in the
order of their codes) and, for images, `shape` ([channels, height, width]).
"""

from __future__ import annotations

import pyarrow as pa

from .decisions import SCHEMA


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _wide(name: str, size: int, kind: pa.DataType | None = None) -> pa.Field:
    element = pa.field("element", kind or pa.float32(), nullable=False)
    return _field(name, pa.list_(element, size))


TRAIN, TEST = "train", "test"

DATASET = pa.schema(
    [
        _field("id", pa.int64()),
        _field("source", pa.string()),  # file#row, row from 1; or the file of an image
        _field("split", pa.string()),  # train or test
        _field("label", pa.int32()),  # code of the class, from 0
        _field("clean_label", pa.int32()),  # before noise was planted; -1 where none was
        _field("group", pa.string()),  # "" where no group field was named
        _field("text", pa.string()),  # "" for another kind
        _field("features", pa.list_(pa.float32())),  # empty for another kind
        _field("image", pa.binary()),  # PNG or JPEG; empty for another kind
    ]
)
# One row for a sample after an epoch of a run; rows of an epoch stand in one shard.
DYNAMICS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("sample", pa.int64()),
        _field("run", pa.int32()),  # from 0
        _field("epoch", pa.int32()),  # from 0
        _field("true_probability", pa.float32()),
        _field("margin", pa.float32()),  # logits
        _field("correct", pa.bool_()),
        _field("loss", pa.float32()),  # nats
        _field("el2n", pa.float32()),
        pa.field("probability_change", pa.float32()),  # since the epoch before; null in the first
        pa.field("gradient_norm", pa.float32()),  # null where it was not asked for
        _field("logits", pa.list_(pa.float32())),  # empty where they were not asked for
    ]
)
CLUSTERS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("cluster", pa.int32()),
        _field("centroid_distance", pa.float32()),  # 1 - cosine
    ]
)
SHAPLEY = pa.schema([_field("id", pa.int64()), _field("shapley", pa.float32())])
DATASET_DECISION = pa.schema([*SCHEMA, _field("weight", pa.float32())])


def outputs(classes: int, d: int) -> pa.Schema:
    """What a trained classifier says of each row: log probabilities, and its last features."""
    return pa.schema(
        [
            _field("id", pa.int64()),
            _wide("log_probability", classes),  # nats, natural order of the classes
            _wide("embedding", d),  # unit vector: what enters the last layer
        ]
    )


def neighbours(k: int) -> pa.Schema:
    """The k nearest other rows of each row, nearest first; id -1 where there are fewer."""
    return pa.schema(
        [
            _field("id", pa.int64()),
            _wide("neighbour", k, pa.int64()),
            _wide("neighbour_distance", k),  # Euclidean, of unit vectors
        ]
    )


# One row for a student: a fraction of the rows, how they were taken, with or without a teacher.
STUDENTS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("fraction", pa.float32()),  # share of the training rows kept
        _field("selection", pa.string()),  # random, chosen or full
        _field("distilled", pa.bool_()),
        _field("seed", pa.int32()),
        _field("alpha", pa.float32()),  # weight of the teacher's part of the loss
        _field("temperature", pa.float32()),
        _field("rows", pa.int32()),
        _field("steps", pa.int32()),  # of the optimiser
        _field("accuracy", pa.float32()),  # on the test split
        _field("worst_class_accuracy", pa.float32()),
    ]
)
# One row for a short training with one alpha.
ALPHAS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("fraction", pa.float32()),
        _field("selection", pa.string()),
        _field("alpha", pa.float32()),
        _field("accuracy", pa.float32()),  # on the held-out part of the kept rows
        _field("seed", pa.int32()),
        _field("used", pa.bool_()),  # the alpha that the students of this line are trained with
    ]
)
# One row for a score: how well it finds labels that are known to be wrong.
NOISE = pa.schema(
    [
        _field("id", pa.int64()),
        _field("score", pa.string()),
        _field("higher_is", pa.string()),  # harder
        _field("auc", pa.float32()),  # NaN where no label, or every label, is wrong
        _field("found", pa.int32()),  # wrong labels among the rows looked at
        _field("planted", pa.int32()),
        _field("looked", pa.int32()),  # the hardest rows, as many as were planted
    ]
)
