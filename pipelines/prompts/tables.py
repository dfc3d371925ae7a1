"""Schemas of the tables of prompt search. All but the task's are about words or prompts."""

from __future__ import annotations

import pyarrow as pa


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)

# One row for a labelled text. No text stands in two parts. The manifest's options are the task
# (`task.PromptTaskOptions`), its notes have `classes`: names in the order of their codes.
TASK = pa.schema(
    [
        _field("id", pa.int64()),
        _field("part", pa.string()),  # train, validation or test
        _field("shot", pa.int32()),  # place in its class and part, from 0
        _field("label", pa.int32()),  # code of the class
        _field("text", pa.string()),
    ]
)
# One row for an entry of the vocabulary, kept or not; `score` and the like as any decision.
VOCABULARY = pa.schema(
    [
        _field("id", pa.int64()),
        _field("token", pa.string()),  # as the tokenizer spells it
        _field("token_id", pa.int64()),  # -1 for a word from a file
        _field("text", pa.string()),  # what is put into a prompt
        _field("keep", pa.bool_()),
        _field("reason", pa.string()),
    ]
)
# One row for a word that the vocabulary keeps.
TOKEN_CLUSTERS = pa.schema(
    [
        _field("id", pa.int64()),
        _field("text", pa.string()),
        _field("cluster", pa.int32()),
        _field("centroid_distance", pa.float32()),  # Euclidean
        _field("keep", pa.bool_()),  # the nearest word to its centroid
        _field("reason", pa.string()),
    ]
)
# The rewards that an influence is measured in, by the name of their column. All are higher =
# kept; `kl` needs no labels, `negative_entropy` neither.
REWARDS = ("log_likelihood", "gap", "negative_entropy", "kl", "double_softmax")
# One row for a candidate word: what it changes against the empty prompt. The first row is the
# empty prompt itself (`text` ""), whose influences are 0.
INFLUENCE = pa.schema(
    [
        _field("id", pa.int64()),
        _field("text", pa.string()),
        _field("rows_seen", pa.int32()),
        _field("finalist", pa.bool_()),  # seen on all rows; False where halving dropped it before
        *(_field(name, pa.float32()) for name in REWARDS),
        _field("accuracy", pa.float32()),  # share of the rows seen, minus that of the empty prompt
        _field("tokens", pa.int64()),  # that the model read for it
        _field("log_probability", pa.list_(pa.float32())),  # (rows_seen, C), flat
    ]
)
# One row for a prompt that a search asked about, in the order asked.
SEARCH = pa.schema(
    [
        _field("id", pa.int64()),
        _field("round", pa.int32()),  # position, generation or batch, from 0
        _field("prompt", pa.string()),
        _field("words", pa.list_(pa.int64())),  # ids in the vocabulary
        _field("reward", pa.float32()),  # mean over the training rows
        _field("accuracy", pa.float32()),  # on the training rows
        _field("best", pa.float32()),  # highest reward so far
        _field("queries", pa.int64()),  # (prompt, row) pairs asked so far
        _field("tokens", pa.int64()),  # read so far
        _field("stop", pa.string()),  # why the search ended here; "" on all rows but the last
    ]
)
# One row for a prompt and a part of the rows that no search has seen.
VERDICT = pa.schema(
    [
        _field("id", pa.int64()),
        _field("contender", pa.string()),  # found, empty, manual, or control
        _field("prompt", pa.string()),
        _field("part", pa.string()),  # validation or test
        _field("rows", pa.int32()),
        _field("accuracy", pa.float32()),
        _field("accuracy_error", pa.float32()),  # standard error, bootstrap over rows
        _field("log_likelihood", pa.float32()),
        _field("lead_of_found", pa.float32()),  # of the found prompt over this one, as judged
        _field("lead_error", pa.float32()),  # its standard error, paired bootstrap over rows
        _field("tokens", pa.int64()),
        _field("chosen", pa.bool_()),
        _field("reason", pa.string()),
    ]
)
