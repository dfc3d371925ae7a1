"""Step `teacher_logits`: what a dense model says about each target of the rows, to distil from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...errors import InputError
from ...storage import Table
from ..bundles import shard_of
from ..compression.model_tables import MODEL_STEPS, model_source
from ..compression.teacher_tables import teacher_schema
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import causal, resolved_causal
from ..reuse import RowWise
from ..tables import shard_ranges

_MASKED = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "xlm-roberta")
_READ = ["id", "input_ids", "labels"]


class TeacherLogitsOptions(StepOptions):
    """Options of `teacher_logits`.

    Attributes
    ----------
    model
        Folder or hub id of the teacher, the dense model; the input `model` where not given.
    k
        Most likely tokens that are kept of each target; all others are kept as one mass.
    values
        How log probabilities are stored.
    rows_a_shard
        The work that is redone after a failure, in rows.
    tokens_a_batch
        Padded tokens in a batch at most; rows of like length go together.
    device, dtype
        Of the teacher. `dtype` enters the key, `device` does not.
    """

    model: str | None = None
    k: int = Field(default=64, ge=1, le=1_000_000)
    values: Literal["float16", "float32"] = "float16"
    rows_a_shard: int = Field(default=256, ge=1, le=1_000_000)
    tokens_a_batch: int = Field(default=2048, ge=1)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def plan(options: TeacherLogitsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each few rows.

    Raises InputError where the rows were made with another tokenizer than the teacher's, and
    where the teacher is a masked model.
    """
    from ...pruners.models.streamed_model import read_config

    source, rows = model_source(options.model, inputs.get("model")), inputs["rows"]
    found = resolved_causal(source)
    made_with = rows.manifest.models.get("tokenizer", found.tokenizer_sha256)
    if made_with != found.tokenizer_sha256:
        raise InputError(
            f"`{rows.manifest.name}` was made with the tokenizer {made_with[:16]}, and the teacher"
            f" {source} has {found.tokenizer_sha256[:16]}. Make the rows with the teacher's own."
        )
    kind = str(read_config(found.path).model_type)
    if kind in _MASKED:
        raise InputError(
            f"{source}: expected a causal model as teacher; found a masked one ({kind}). Recover a"
            " masked model by bias_norm, mask_lora, lora or layerwise."
        )
    ranges = [
        (part["shard"], start, stop)
        for part in rows.manifest.parts
        for start, stop in shard_ranges(part["rows"], options.rows_a_shard)
    ]
    value = pa.float16() if options.values == "float16" else pa.float32()
    models = {"model": found.sha256, "tokenizer": found.tokenizer_sha256}
    notes = {"model": options.model or "input", "rows": rows.manifest.name, "k": options.k}
    return Plan(
        teacher_schema(value),
        len(ranges),
        options.model_dump(exclude={"model", "device"}),
        models,
        payload=(source, ranges),
        notes=notes,
    )


def read(job: Job, index: int) -> Iterator[pa.Table]:
    """The rows of one shard."""
    number, start, stop = job.plan.payload[1][index]
    yield shard_of(job.input("rows"), number, _READ).slice(start, stop - start)


def find(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Rows with these ids."""
    return job.input("rows").lookup(ids, columns=_READ, missing="skip")


def score(job: Job, rows: pa.Table, out: Rows) -> None:
    """Ask the teacher about some rows; those without a target are left out and counted."""
    from ..compression.teacher import ask_teacher

    options: TeacherLogitsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    table = job.input("rows")
    loaded = causal(job.plan.payload[0], options.device, options.dtype)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    asked, without = _asked(rows.to_pylist(), vocabulary, table)
    made = ask_teacher(
        loaded.model, asked, k=options.k, tokens=options.tokens_a_batch, schema=job.plan.schema
    )
    out.write(pa.Table.from_pylist(made, job.plan.schema))
    out.count(len(made), {"no_target": without} if without else {})


def _asked(
    rows: list[dict[str, Any]], vocabulary: int, table: Table
) -> tuple[list[tuple[int, Any, Any]], int]:
    """Id, tokens and positions of the targets of each row that has any; how many have none."""
    from ..compression.calibration import IGNORED

    asked, without = [], 0
    for row in rows:
        tokens, labels = np.array(row["input_ids"], np.int64), np.array(row["labels"], np.int64)
        positions = np.flatnonzero(labels[1:] != IGNORED) + 1
        if not len(positions):
            without += 1
            continue
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(
                f"`{table.manifest.name}`, row {row['id']}: expected token ids below {vocabulary};"
                f" found {tokens.min()} to {tokens.max()}. Make the rows with the teacher's"
                " tokenizer."
            )
        asked.append((int(row["id"]), tokens, positions))
    return asked, without


ROWS = RowWise(("rows",), read, find, score)
SPEC = StepSpec(
    name="teacher_logits",
    version=1,
    options=TeacherLogitsOptions,
    inputs={
        "rows": Slot(("calibration_rows",)),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    shard=ROWS.make,
    row_wise=ROWS,
    about="What a dense model says about each target of the rows, to distil from.",
)
