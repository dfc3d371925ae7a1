"""The schema of what a teacher says about the targets of rows."""

from __future__ import annotations

import pyarrow as pa


def teacher_schema(values: pa.DataType) -> pa.Schema:
    """Columns of a teacher_logits table; `values` is float16 or float32.

    A row has T targets, with k entries for each of them in `values` and `indices`, target by
    target. Values are log probabilities (logit - logsumexp, nats): near 0, where the mass is,
    float16 is finest. `tail` is the log mass of the V - k other tokens, -inf where k = V.
    """

    def lists(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(kind), nullable=False)

    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            lists("token_position", pa.int32()),  # T, of the targets in the row, ascending
            lists("values", values),  # T * k
            lists("indices", pa.int32()),  # T * k, ascending within a target
            lists("tail", pa.float32()),  # T
            lists("logsumexp", pa.float32()),  # T, of the logits
        ]
    )
