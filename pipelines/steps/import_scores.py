"""Step `import_scores`: scores that were computed elsewhere, under the ids of a data set's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ...errors import InputError
from ...pruners.contract import SIGNALS
from ...storage import Table, file_digest
from ..dataset_tables import TRAIN
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec


class ImportScoresOptions(StepOptions):
    """Options of `import_scores`.

    Attributes
    ----------
    path
        Parquet, CSV, JSONL, or NPZ of one-dimensional arrays.
    columns
        Signal to column: `{memorisation: mem}`. Signals of one float a row, such as
        memorisation, influence, difficulty, rating or quality.
    key
        How lines find their row: "source", the column of that name as `read_dataset` wrote it;
        "id", row ids; "order", the n-th line is the n-th training row of the table.
    key_column
        Column that holds it; the key's own name where not given.
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    columns: dict[str, str] = Field(min_length=1)
    key: Literal["source", "id", "order"] = "source"
    key_column: str | None = None

    @model_validator(mode="after")
    def _are_signals(self) -> ImportScoresOptions:
        known = [n for n, s in SIGNALS.items() if s.dtype == "float32" and s.shape == "N"]
        for name in self.columns:
            if name not in known:
                raise ValueError(f"unknown signal `{name}`; known: {', '.join(known)}")
        return self


def plan(options: ImportScoresOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard, under the digest of the file."""
    path = Path(options.path)
    if not path.is_file():
        raise InputError(f"expected a file of scores at {path}, found none; mend `path`.")
    names = sorted(options.columns)
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            *(pa.field(name, pa.float32(), nullable=False) for name in names),
        ]
    )
    identity = options.model_dump(exclude={"path"}) | {"sha256": file_digest(path)}
    return Plan(schema, 1, identity, notes={"path": options.path})


def shard(job: Job, index: int, out: Rows) -> None:
    """Join the scores to the training rows."""
    options: ImportScoresOptions = job.options  # type: ignore[assignment]
    data = job.input("data").to_table(columns=["id", "source", "split"])
    data = data.filter(pc.equal(data.column("split"), TRAIN))
    found = _read(Path(options.path))
    wanted = list(options.columns.values())
    key = options.key_column or options.key
    for name in wanted if options.key == "order" else [key, *wanted]:
        if name not in found:
            raise InputError(
                f"{options.path}: expected a column `{name}`, found {', '.join(sorted(found))}."
            )
    at = _places(options, data, found.get(key))
    columns = [data.column("id")]
    for name in sorted(options.columns):
        values = found[options.columns[name]]
        columns.append(pa.array(_numbers(options, name, values, len(at))[at], pa.float32()))
    out.write(pa.Table.from_arrays(columns, schema=job.plan.schema))
    out.count(data.num_rows, {})


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files if arrays[name].ndim == 1}
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        elif path.suffix == ".csv":
            table = pa_csv.read_csv(path)
        else:
            table = pa_json.read_json(path)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{path}: expected Parquet, CSV, JSONL or NPZ by its ending; found: {error}"
        ) from error
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _places(options: ImportScoresOptions, data: pa.Table, keys: Any) -> npt.NDArray[np.int64]:
    """Line of the file for each training row."""
    if options.key == "order":
        return np.arange(data.num_rows)
    places = {key: line for line, key in enumerate(keys.tolist())}
    if len(places) < len(keys):
        raise InputError(
            f"{options.path}: expected every {options.key} once; {len(keys) - len(places)} lines"
            " repeat one. Keep one line for each row."
        )
    rows = data.column(options.key).to_pylist()
    lost = [row for row in rows if row not in places]
    if lost:
        raise InputError(
            f"{options.path}: expected a line for each of {len(rows)} training rows; {len(lost)}"
            f" have none, the first is {options.key} {lost[0]!r}."
        )
    return np.array([places[row] for row in rows], np.int64)


def _numbers(
    options: ImportScoresOptions, name: str, values: Any, rows: int
) -> npt.NDArray[np.float32]:
    column = options.columns[name]
    try:
        made = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{options.path}: column `{column}` must hold numbers: {error}."
        ) from error
    if options.key == "order" and len(made) != rows:
        raise InputError(
            f"{options.path}: column `{column}` has {len(made)} values for {rows} training rows;"
            " with `key: order` they must be as many."
        )
    bad = np.flatnonzero(~np.isfinite(made))
    if bad.size:
        raise InputError(
            f"{options.path}: column `{column}` must be finite; line {bad[0] + 1} holds"
            f" {made[bad[0]]}. Give that row a number."
        )
    return made


SPEC = StepSpec(
    name="import_scores",
    version=1,
    options=ImportScoresOptions,
    inputs={"data": Slot(("read_dataset",))},
    plan=plan,
    shard=shard,
    about="Scores computed elsewhere, under the ids of a data set's rows.",
)
