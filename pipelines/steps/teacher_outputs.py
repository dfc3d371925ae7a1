"""Step `teacher_outputs`: the trained classifier's soft labels and features of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import InputError, ModelError
from ...storage import Table
from ..dataset_tables import outputs
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..reuse import RowWise


class TeacherOutputsOptions(StepOptions):
    """Options of `teacher_outputs`.

    Attributes
    ----------
    device
        cpu, cuda …; None takes what there is.
    """

    device: str | None = None


def plan(options: TeacherOutputsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard for each shard of the data."""
    from ..classifier import check_inputs, classifier_from_table, runs_of

    data, model = inputs["data"], inputs["model"]
    check_inputs(data, inputs.get("embeddings"))
    named, known = model.manifest.notes.get("classes"), data.manifest.notes["classes"]
    if named != known:
        raise InputError(
            f"teacher_outputs: expected a model of the classes of `{data.manifest.name}`,"
            f" {known}; found one of {named}. Train on data with the same classes."
        )
    head = classifier_from_table(model).head
    return Plan(
        outputs(head.out_features, head.in_features),
        len(data.shards()),
        {},
        payload=data.shards(),
        notes={"model": model.manifest.name, "runs": runs_of(model), "classes": known},
    )


def read(job: Job, index: int) -> Iterator[pa.Table]:
    """The rows of one shard of the data, in its order."""
    data, number = job.input("data"), job.plan.payload[index]
    batches = list(data.shard_batches(number, _read(job)))
    schema = pa.schema([data.schema.field(name) for name in _read(job)])
    yield _with_vectors(job, pa.Table.from_batches(batches, schema=schema))


def find(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Rows of the data with these ids."""
    found = job.input("data").lookup(ids, columns=_read(job), missing="skip")
    return _with_vectors(job, found)


def _read(job: Job) -> list[str]:
    from ..classifier import example_columns

    return example_columns(job.input("data"), _vectors(job))


def _vectors(job: Job) -> Table | None:
    return job.input("embeddings") if job.has("embeddings") else None


def _with_vectors(job: Job, rows: pa.Table) -> pa.Table:
    """The rows with their vectors beside them, where those are the features."""
    vectors = _vectors(job)
    if vectors is None:
        return rows
    ids = rows.column("id").to_numpy()
    return rows.append_column(
        "embedding", vectors.lookup(ids, columns=["embedding"]).column("embedding")
    )


def score(job: Job, rows: pa.Table, out: Rows) -> None:
    """What the classifier says of some rows.

    log_probability is the log of the mean over the runs of their probabilities; embedding is
    the L2-normalised input of the last layer of run 0. Features that are all zero have no
    direction: such a row gets the unit vector with equal parts in every place.
    """
    from ..classifier import (
        classifier_from_table,
        load_examples,
        pick_device,
        predict,
        runs_of,
    )

    options: TeacherOutputsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    examples = load_examples(job.input("data"), _vectors(job), rows=rows)
    table, device = job.input("model"), pick_device(options.device)
    _check_shape(table, examples.shape)
    found = [
        predict(classifier_from_table(table, run).to(device), examples.x)
        for run in range(runs_of(table))
    ]
    columns = [
        pa.array(examples.ids, pa.int64()),
        _fixed(mean_log_probability([logits for logits, _ in found])),
        _fixed(unit_rows(found[0][1])),
    ]
    out.write(pa.Table.from_arrays(columns, schema=job.plan.schema))
    out.count(len(examples), {})


def mean_log_probability(logits: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Log of the mean probability of several models' logits (N, C), (N, C) float32, nats."""
    from ..dynamics import log_probabilities

    each = np.stack([log_probabilities(one) for one in logits])
    mean = np.logaddexp.reduce(each, axis=0) - np.log(len(each))
    return np.asarray(mean, np.float32)


def unit_rows(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; a row of zeros becomes the vector with equal parts."""
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise ModelError(
            f"teacher_outputs: expected finite features, found others in row {row} of the shard."
            " Train with a lower `learning_rate`."
        )
    wide = vectors.astype(np.float64)
    wide[~wide.any(axis=1)] = 1.0
    wide /= np.abs(wide).max(axis=1, keepdims=True)  # so that no square underflows
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True), np.float32)


def _fixed(values: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.ravel(), pa.float32()), values.shape[1]
    )


def _check_shape(model: Table, shape: tuple[int, ...]) -> None:
    from ..classifier import description_of

    expected = tuple(description_of(model)["shape"])
    if shape != expected:
        raise InputError(
            f"teacher_outputs: expected rows of shape {list(expected)}, as `{model.manifest.name}`"
            f" was trained on; found {list(shape)}. Train on this data set, or read it to that"
            " shape."
        )


ROWS = RowWise(("data", "embeddings"), read, find, score)
SPEC = StepSpec(
    name="teacher_outputs",
    version=1,
    options=TeacherOutputsOptions,
    inputs={
        "data": Slot(("read_dataset",)),
        "model": Slot(("train_classifier",)),
        "embeddings": Slot(("embed",), optional=True),
    },
    plan=plan,
    shard=ROWS.make,
    row_wise=ROWS,
    about="Soft labels and last features of every row, by a trained classifier.",
)
