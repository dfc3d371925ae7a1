"""Training dynamics as a table: written while a classifier trains, read as trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, StoreError
from ..pruners.signals.dynamics import (
    Columns,
    GradientNorm,
    gradient_norms,
    last_layer_norms,
    log_probabilities,
    measures,
)
from ..storage import Manifest, Store, Table, TableWriter, digest, row_ids
from .dataset_tables import DYNAMICS

__all__ = [
    "DynamicsRecorder",
    "EpochWriter",
    "GradientNorm",
    "gradient_norms",
    "last_layer_norms",
    "log_probabilities",
    "measures",
    "trajectories",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# Signal name -> column of the table.
TRAJECTORIES = {
    "true_probability": "true_probability",
    "margin": "margin",
    "correct": "correct",
    "loss_trajectory": "loss",
    "el2n": "el2n",
    "probability_change": "probability_change",
    "gradient_norm": "gradient_norm",
}
_ROWS_A_WRITE = 16_384


class Labelled(Protocol):
    """Rows with an id and a label, such as `Examples`."""

    @property
    def ids(self) -> IntArray:
        """(N,) int64, unique."""
        ...

    @property
    def label(self) -> IntArray:
        """(N,) int64."""
        ...


class EpochWriter:
    """Writes one shard of DYNAMICS an epoch: number run * epochs + epoch.

    Epochs of a run come in order. One that is in the table already is not written again, but
    is needed where the next one asks for the change of probabilities since.
    """

    def __init__(
        self,
        writer: TableWriter,
        examples: Labelled,
        runs: int,
        epochs: int,
        *,
        gradient_norm: bool = False,
        keep_logits: bool = False,
    ) -> None:
        if runs < 1 or epochs < 1:
            raise InputError(f"expected at least one run and one epoch; found {runs} and {epochs}.")
        ids, counts = np.unique(examples.ids, return_counts=True)
        if len(ids) < len(examples.ids):
            raise InputError(
                f"expected rows with unique ids; found id {ids[np.argmax(counts)]} more than once."
            )
        self.ids, self.label = examples.ids, examples.label
        self.runs, self.epochs = runs, epochs
        self._writer = writer
        self._gradient_norm, self._keep_logits = gradient_norm, keep_logits
        self._left = set(writer.pending(runs * epochs))
        self._before: tuple[int, int, FloatArray] | None = None

    def pending(self) -> list[tuple[int, int]]:
        """(run, epoch) of the shards that are not written yet, in order."""
        return [divmod(number, self.epochs) for number in sorted(self._left)]

    def written(self, run: int) -> int:
        """How many epochs of a run, from the first on, are written without a gap."""
        left = [number % self.epochs for number in self._left if number // self.epochs == run]
        return min(left, default=self.epochs)

    def is_pending(self, run: int, epoch: int) -> bool:
        """Whether that epoch is not written yet."""
        return run * self.epochs + epoch in self._left

    def epoch(
        self,
        run: int,
        epoch: int,
        logits: npt.ArrayLike,
        *,
        features: npt.ArrayLike | None = None,
        gradient_norm: npt.ArrayLike | None = None,
    ) -> None:
        """Take what the classifier says of all rows after an epoch.

        Parameters
        ----------
        run, epoch
            From 0.
        logits
            (N, C), aligned with the examples, in evaluation mode.
        features
            (N, d) that enter the last layer, one with a bias: gives its gradient's norm.
        gradient_norm
            (N,) where it was computed otherwise. One of the two is given where the writer was
            told of gradient norms, else neither.

        Raises InputError for an epoch out of order or arrays that do not fit, ModelError for
        logits that are not finite.
        """
        if not (0 <= run < self.runs and 0 <= epoch < self.epochs):
            raise InputError(
                f"expected a run below {self.runs} and an epoch below {self.epochs}; found run"
                f" {run}, epoch {epoch}."
            )
        array = np.asarray(logits, np.float32)
        before = self._since(run, epoch)
        columns = measures(array, self.label, before)
        number = run * self.epochs + epoch
        if number in self._left:
            columns |= self._norms(array, features, gradient_norm)
            self._write(number, array, columns)
            self._left.remove(number)
        self._before = run, epoch, log_probabilities(array).astype(np.float32)

    def _since(self, run: int, epoch: int) -> FloatArray | None:
        if epoch == 0:
            return None
        if self._before is not None and self._before[:2] == (run, epoch - 1):
            return self._before[2]
        if run * self.epochs + epoch not in self._left:
            return None  # nothing will be written
        raise InputError(
            f"epoch {epoch} of run {run} needs the logits of epoch {epoch - 1} to tell what"
            " changed: give that epoch first. One that is in the table is not written again."
        )

    def _norms(
        self,
        logits: FloatArray,
        features: npt.ArrayLike | None,
        gradient_norm: npt.ArrayLike | None,
    ) -> Columns:
        if gradient_norm is not None:
            given: FloatArray | None = np.asarray(gradient_norm, np.float32)
        elif features is not None:
            given = last_layer_norms(logits, np.asarray(features), self.label)
        else:
            given = None
        if (given is not None) != self._gradient_norm:
            raise InputError(
                "expected `features` or `gradient_norm` with every epoch where gradient_norm=True"
                f" was asked for, else neither; found {'none' if given is None else 'one'} with"
                f" gradient_norm={self._gradient_norm}."
            )
        if given is None:
            return {}
        if given.shape != self.label.shape or not np.isfinite(given).all():
            raise InputError(
                f"`gradient_norm` must be finite and of shape {self.label.shape}; found"
                f" {given.shape}."
            )
        return {"gradient_norm": given}

    def _write(self, number: int, logits: FloatArray, columns: Columns) -> None:
        run, epoch = divmod(number, self.epochs)
        with self._writer.shard(number) as out:
            for start in range(0, len(self.ids), _ROWS_A_WRITE):
                part = slice(start, start + _ROWS_A_WRITE)
                kept = logits[part] if self._keep_logits else logits[part, :0]
                taken = {name: column[part] for name, column in columns.items()}
                out.write(_rows(run, epoch, self.ids[part], taken, kept))
            out.count(kept=len(self.ids), dropped={})


def _rows(run: int, epoch: int, ids: IntArray, columns: Columns, logits: FloatArray) -> pa.Table:
    n, width = logits.shape
    flat = pa.array(logits.reshape(-1), pa.float32())
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    made: dict[str, Any] = {
        "id": row_ids([run] * n, [epoch] * n, ids),
        "sample": ids,
        "run": np.full(n, run, np.int32),
        "epoch": np.full(n, epoch, np.int32),
        "logits": pa.ListArray.from_arrays(offsets, flat),
        **columns,
    }
    arrays = [
        pa.array(made[field.name], field.type) if field.name in made else pa.nulls(n, field.type)
        for field in DYNAMICS
        if field.name != "logits"
    ]
    return pa.Table.from_arrays([*arrays, made["logits"].cast(DYNAMICS.field("logits").type)],
                                schema=DYNAMICS)  # fmt: skip


class DynamicsRecorder:
    """The dynamics of a training loop of one's own, as a table that the methods read.

        with DynamicsRecorder(store, "dynamics", examples, runs=1, epochs=30) as recorder:
            for epoch in range(30):
                ...  # train one epoch
                recorder.epoch(0, epoch, logits)  # (N, C) of `examples`, evaluation mode
            recorder.commit()

    A loop that was killed goes on: `pending()` names the epochs that are missing, and those that
    are there are not written again.

    Parameters
    ----------
    store, name
        Where the table goes, and what points to it.
    examples
        Rows with `ids` and `label`, such as `Examples`.
    runs, epochs
        How many there will be.
    gradient_norm
        Every epoch comes with `features` or `gradient_norm`.
    keep_logits
        Store the logits as well, 4 bytes a class, row and epoch.
    identity
        What tells this training from another (network, learning rate …), JSON-able: it enters
        the key beside the rows, and the recorder cannot see it by itself.
    parents
        Keys of tables that the rows came from.

    Raises InputError where this training is in the store already.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        examples: Labelled,
        runs: int = 1,
        epochs: int = 30,
        *,
        gradient_norm: bool = False,
        keep_logits: bool = False,
        identity: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
    ) -> None:
        self._examples, self._shape = examples, (runs, epochs)
        self._kept = {"gradient_norm": gradient_norm, "keep_logits": keep_logits}
        self._writer = store.write(
            name=name,
            step="record_dynamics",
            options={
                "runs": runs,
                "epochs": epochs,
                **self._kept,
                "rows": digest([examples.ids.tolist(), examples.label.tolist()]),
                "identity": dict(identity or {}),
            },
            inputs=list(parents),
            schema=DYNAMICS,
        )
        self._epochs: EpochWriter | None = None

    def __enter__(self) -> Self:
        self._writer.__enter__()
        try:
            if self._writer.committed:
                raise InputError(
                    f"the dynamics `{self._writer.name}` of these rows are in the store already"
                    f" ({self._writer.key[:12]}). Read them, or give another `identity` for"
                    " another training."
                )
            self._epochs = EpochWriter(self._writer, self._examples, *self._shape, **self._kept)
        except BaseException:
            self._writer.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def pending(self) -> list[tuple[int, int]]:
        """(run, epoch) of the epochs that are not written yet, in order."""
        return self._open().pending()

    def epoch(
        self,
        run: int,
        epoch: int,
        logits: npt.ArrayLike,
        *,
        features: npt.ArrayLike | None = None,
        gradient_norm: npt.ArrayLike | None = None,
    ) -> None:
        """Write one epoch of one run; see `EpochWriter.epoch`."""
        self._open().epoch(run, epoch, logits, features=features, gradient_norm=gradient_norm)

    def commit(self) -> Manifest:
        """Finish the table. Raises StoreError where an epoch is missing."""
        self._open()
        runs, epochs = self._shape
        return self._writer.commit(notes={"runs": runs, "epochs": epochs})

    def _open(self) -> EpochWriter:
        if self._epochs is None:
            raise InputError("expected the recorder in a `with` statement; open it first.")
        return self._epochs


def trajectories(
    table: Table, wanted: Sequence[str], ids: npt.ArrayLike
) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """Signals of a DYNAMICS table as arrays aligned with `ids`, and the number of runs.

    Parameters
    ----------
    table
        Of `train_classifier` or a `DynamicsRecorder`. Rows are read in batches; memory is that
        of the arrays returned.
    wanted
        Names of signals: true_probability, margin, correct, loss_trajectory, el2n,
        probability_change, gradient_norm.
    ids
        (N,) int64, unique; other rows of the table are passed over.

    Returns
    -------
    Name -> (N, runs * epochs), float32 or bool, the epochs of run 0 first. probability_change has
    one value fewer a run: (N, runs * (epochs - 1)).

    Raises
    ------
    InputError
        An unknown name, an id that the table lacks or that is given twice, or a gradient norm
        that was not recorded.
    """
    unknown = sorted(set(wanted) - set(TRAJECTORIES))
    if unknown:
        raise InputError(
            f"expected signals among {', '.join(TRAJECTORIES)}; found {', '.join(unknown)}."
        )
    order, asked = _sorted_ids(ids)
    runs, epochs = _extent(table)
    places = _Places(table, order, asked, runs, epochs)
    made: dict[str, npt.NDArray[Any]] = {}
    for name in wanted:
        width = runs * (epochs - (name == "probability_change"))
        made[name] = np.zeros((len(asked), width), np.bool_ if name == "correct" else np.float32)
    columns = sorted({TRAJECTORIES[name] for name in wanted})
    for batch in table.batches(["sample", "run", "epoch", *columns]):
        inside, row, run, epoch = places.of(batch)
        for name in wanted:
            column = batch.column(TRAJECTORIES[name])
            if name == "probability_change":
                later = epoch > 0
                values = _values(name, column, table, inside[later])
                made[name][row[later], run[later] * (epochs - 1) + epoch[later] - 1] = values
            else:
                values = _values(name, column, table, inside)
                made[name][row, run * epochs + epoch] = values
    places.check_complete()
    return made, runs


class _Places:
    """Where the rows of a batch go in the arrays, and whether all came once."""

    def __init__(
        self, table: Table, order: IntArray, asked: IntArray, runs: int, epochs: int
    ) -> None:
        self._table, self._order, self._sorted = table, order, asked
        self._epochs = epochs
        self._seen = np.zeros((len(asked), runs * epochs), np.bool_)

    def of(self, batch: pa.RecordBatch) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Places in the batch of the rows that were asked for; their row, run and epoch."""
        sample = batch.column("sample").to_numpy()
        found = np.minimum(np.searchsorted(self._sorted, sample), max(len(self._sorted) - 1, 0))
        inside = (
            np.flatnonzero(self._sorted[found] == sample)
            if len(self._sorted)
            else np.zeros(0, np.int64)
        )
        row = self._order[found[inside]] if len(inside) else inside
        run = batch.column("run").to_numpy().astype(np.int64)[inside]
        epoch = batch.column("epoch").to_numpy().astype(np.int64)[inside]
        self._seen[row, run * self._epochs + epoch] = True
        return inside, row, run, epoch

    def check_complete(self) -> None:
        """Raise InputError for the first row that lacks an epoch."""
        if self._seen.all():
            return
        row, place = np.argwhere(~self._seen)[0]
        back = np.empty_like(self._order)
        back[self._order] = np.arange(len(self._order))
        run, epoch = divmod(int(place), self._epochs)
        raise InputError(
            f"table `{self._table.manifest.name}`: expected dynamics of every row asked for; found"
            f" none of row {self._sorted[back[row]]} in run {run}, epoch {epoch}. Train on the"
            " rows that are to be decided about."
        )


def _sorted_ids(ids: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    array = np.asarray(ids, np.int64)
    order = np.argsort(array, kind="stable").astype(np.int64)
    asked = array[order]
    if len(asked) > 1 and (np.diff(asked) == 0).any():
        twice = asked[int(np.argmax(np.diff(asked) == 0))]
        raise InputError(f"expected unique ids; found {twice} more than once.")
    return order, asked


def _extent(table: Table) -> tuple[int, int]:
    """Runs and epochs of the table."""
    most = [0, 0]
    for batch in table.batches(["run", "epoch"]):
        for place, name in enumerate(("run", "epoch")):
            high = pc.max(batch.column(name)).as_py()
            most[place] = max(most[place], 0 if high is None else high + 1)
    if 0 in most:
        raise StoreError(
            f"table `{table.manifest.name}` holds no dynamics: expected at least one epoch of one"
            " row. Run `train_classifier` on a data set with rows in the train split."
        )
    return most[0], most[1]


def _values(name: str, column: pa.Array, table: Table, rows: IntArray) -> npt.NDArray[Any]:
    taken = column.take(pa.array(rows))
    if taken.null_count:
        step = table.manifest.step
        advice = (
            "Set `gradient_norm: last_layer` (or `all`) of that step and run again."
            if name == "gradient_norm"
            else "Make the table again."
        )
        raise InputError(
            f"table `{table.manifest.name}` ({step}) has no `{name}` for {taken.null_count} of"
            f" the rows asked for. {advice}"
        )
    return np.asarray(taken.to_numpy(zero_copy_only=False))
