"""Schemas of the tables of prompt search. All but the task's are about words or prompts."""

from __future__ import annotations

import pyarrow as pa

from ..columns import required

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)

# One row for a labelled text. No text stands in two parts. The manifest's options are the task
# (`task.PromptTaskOptions`), its notes have `classes`: names in the order of their codes.
TASK = pa.schema(
    [
        required("id", pa.int64()),
        required("part", pa.string()),  # train, validation or test
        required("shot", pa.int32()),  # place in its class and part, from 0
        required("label", pa.int32()),  # code of the class
        required("text", pa.string()),
    ]
)
# One row for an entry of the vocabulary, kept or not; `score` and the like as any decision.
VOCABULARY = pa.schema(
    [
        required("id", pa.int64()),
        required("token", pa.string()),  # as the tokenizer spells it
        required("token_id", pa.int64()),  # -1 for a word from a file
        required("text", pa.string()),  # what is put into a prompt
        required("keep", pa.bool_()),
        required("reason", pa.string()),
    ]
)
# One row for a word that the vocabulary keeps.
TOKEN_CLUSTERS = pa.schema(
    [
        required("id", pa.int64()),
        required("text", pa.string()),
        required("cluster", pa.int32()),
        required("centroid_distance", pa.float32()),  # Euclidean
        required("keep", pa.bool_()),  # the nearest word to its centroid
        required("reason", pa.string()),
    ]
)
# The rewards that an influence is measured in, by the name of their column. All are higher =
# kept; `kl` needs no labels, `negative_entropy` neither.
REWARDS = ("log_likelihood", "gap", "negative_entropy", "kl", "double_softmax")
# One row for a candidate word: what it changes against the empty prompt. The first row is the
# empty prompt itself (`text` ""), whose influences are 0.
INFLUENCE = pa.schema(
    [
        required("id", pa.int64()),
        required("text", pa.string()),
        required("rows_seen", pa.int32()),
        required("finalist", pa.bool_()),  # seen on all rows; False where halving dropped it before
        *(required(name, pa.float32()) for name in REWARDS),
        required("accuracy", pa.float32()),  # share of the rows seen, less that of the empty prompt
        required("tokens", pa.int64()),  # that the model read for it
        required("log_probability", pa.list_(pa.float32())),  # (rows_seen, C), flat
    ]
)
# One row for a prompt that a search asked about, in the order asked.
SEARCH = pa.schema(
    [
        required("id", pa.int64()),
        required("round", pa.int32()),  # position, generation or batch, from 0
        required("prompt", pa.string()),
        required("words", pa.list_(pa.int64())),  # ids in the vocabulary
        required("reward", pa.float32()),  # mean over the training rows
        required("accuracy", pa.float32()),  # on the training rows
        required("best", pa.float32()),  # highest reward so far
        required("queries", pa.int64()),  # (prompt, row) pairs asked so far
        required("tokens", pa.int64()),  # read so far
        required("stop", pa.string()),  # why the search ended here; "" on all rows but the last
    ]
)
# One row for a prompt and a part of the rows that no search has seen.
VERDICT = pa.schema(
    [
        required("id", pa.int64()),
        required("contender", pa.string()),  # found, empty, manual, or control
        required("prompt", pa.string()),
        required("part", pa.string()),  # validation or test
        required("rows", pa.int32()),
        required("accuracy", pa.float32()),
        required("accuracy_error", pa.float32()),  # standard error, bootstrap over rows
        required("log_likelihood", pa.float32()),
        required("lead_of_found", pa.float32()),  # of the found prompt over this one, as judged
        required("lead_error", pa.float32()),  # its standard error, paired bootstrap over rows
        required("tokens", pa.int64()),
        required("chosen", pa.bool_()),
        required("reason", pa.string()),
    ]
)
