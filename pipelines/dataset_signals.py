"""Stored tables about a labelled data set as the arrays that methods take.

A signal's name says which input of a step it comes from. `difficulty` comes from a score over
other signals, which a step's option names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, RecipeError
from ..pruners.contract import Array, Signals
from ..pruners.sample.difficulty import difficulty_needs, difficulty_of
from .dataset_tables import TRAIN
from .dynamics import trajectories
from .engine import Slot
from .tables import vectors_of

if TYPE_CHECKING:
    from ..storage import Table

Ints = npt.NDArray[np.int64]

# The inputs of every step that decides, or looks at what methods say, about a data set.
INPUTS = {
    "data": Slot(("read_dataset",)),
    "dynamics": Slot(("train_classifier", "record_dynamics"), optional=True),
    "vectors": Slot(("teacher_outputs", "embed"), optional=True),
    "clusters": Slot(("cluster_rows",), optional=True),
    "neighbours": Slot(("neighbours",), optional=True),
    "shapley": Slot(("knn_shapley",), optional=True),
    "given": Slot(("import_scores",), optional=True),
}
# A decision may go on where an earlier one stopped.
DECIDE_INPUTS = INPUTS | {"after": Slot(("prune_dataset",), optional=True)}
DYNAMICS_SIGNALS = (
    "true_probability",
    "margin",
    "correct",
    "el2n",
    "gradient_norm",
    "probability_change",
    "loss_trajectory",
)
# Signal to the input that holds it; what stands in none of these is looked for in `given`.
_HOME = {
    **dict.fromkeys(("id", "label", "group"), "data"),
    **dict.fromkeys(DYNAMICS_SIGNALS, "dynamics"),
    "answer_loss": "dynamics",
    "embedding": "vectors",
    "cluster": "clusters",
    "centroid_distance": "clusters",
    "neighbour": "neighbours",
    "neighbour_distance": "neighbours",
    "shapley": "shapley",
}
_MADE_BY = {
    "dynamics": "train_classifier",
    "vectors": "teacher_outputs or embed",
    "clusters": "cluster_rows",
    "neighbours": "neighbours",
    "shapley": "knn_shapley",
    "given": "import_scores",
}


@dataclass(frozen=True)
class Rows:
    """The training rows of a data set, N of them, in the table's order.

    Attributes
    ----------
    ids
        (N,) int64.
    label, clean_label
        (N,) int64; the clean one is -1 where no noise was planted.
    group
        (N,) int64 codes of the group names, in sorted order.
    classes
        Names of the classes by code.
    """

    ids: Ints
    label: Ints
    clean_label: Ints
    group: Ints
    classes: list[str]

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Rows:
        """Some of the rows, by number or by mask."""
        return Rows(
            self.ids[rows],
            self.label[rows],
            self.clean_label[rows],
            self.group[rows],
            self.classes,
        )

    @property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """(N,) bool, rows whose label was planted wrong."""
        return np.asarray((self.clean_label >= 0) & (self.clean_label != self.label), np.bool_)


def training_rows(data: Table) -> Rows:
    """Ids, labels and groups of the training rows; InputError where there is none."""
    table = data.to_table(columns=["id", "split", "label", "clean_label", "group"])
    table = table.filter(pc.equal(table.column("split"), TRAIN))
    if not table.num_rows:
        raise InputError(
            f"`{data.manifest.name}` has no row in the split `{TRAIN}`; there is nothing to prune."
            " Lower `holdout`, or look at `split_field`."
        )
    names = np.array(table.column("group").to_pylist(), dtype=str)
    return Rows(
        table.column("id").to_numpy().astype(np.int64),
        table.column("label").to_numpy().astype(np.int64),
        table.column("clean_label").to_numpy().astype(np.int64),
        np.unique(names, return_inverse=True)[1].astype(np.int64),
        list(data.manifest.notes["classes"]),
    )


def expand(needs: Iterable[str], difficulty: str) -> frozenset[str]:
    """The stored signals behind a method's needs: `difficulty` is made of others."""
    wanted = set(needs)
    if "difficulty" in wanted and difficulty != "given":
        wanted = (wanted - {"difficulty"}) | difficulty_needs(difficulty)
    return frozenset(wanted | {"id"})


def check(needs: Iterable[str], inputs: Mapping[str, Table], what: str) -> None:
    """Refuse signals that no input can give.

    Raises
    ------
    RecipeError
        The first that is missing, with the step that makes it and the input that it is for.
    """
    for name in sorted(needs):
        role = _HOME.get(name, "given")
        if role == "data":
            continue
        if role not in inputs:
            raise RecipeError(
                f"{what} needs the signal `{name}`: give the step an input `{role}`, a table made"
                f" by {_MADE_BY[role]}."
            )
        if name == "gradient_norm" and not inputs[role].manifest.options.get("gradient_norm"):
            raise RecipeError(
                f"{what} needs the signal `{name}`, which `{inputs[role].manifest.name}` did not"
                " take. Set `gradient_norm: last_layer` in its train_classifier step."
            )
        if role == "given" and name not in inputs[role].schema.names:
            raise RecipeError(
                f"{what} needs the signal `{name}`, which `{inputs[role].manifest.name}` does not"
                f" hold; its columns are {', '.join(inputs[role].schema.names)}. Name it in the"
                " option `columns` of import_scores."
            )


def gather(
    needs: Iterable[str], inputs: Mapping[str, Table], rows: Rows, *, difficulty: str = "aum"
) -> tuple[Signals, int]:
    """Signals of the training rows, and how many runs their trajectories hold.

    Parameters
    ----------
    needs
        Names of signals, as a method declares them.
    inputs
        Tables by role, as of `INPUTS`.
    rows
        The rows wanted.
    difficulty
        What `difficulty` is: a name of `pruners.sample.difficulty`, or "given" for a column of
        the input `given`.

    Raises
    ------
    RecipeError
        An input is missing.
    InputError
        A table lacks one of the rows.
    """
    needs = frozenset(needs)
    wanted = expand(needs, difficulty)
    check(wanted, inputs, "the method")
    arrays: dict[str, Array] = {"id": rows.ids, "label": rows.label, "group": rows.group}
    runs = 1
    dynamic = wanted & {*DYNAMICS_SIGNALS, "answer_loss"}
    if dynamic:
        columns = {"loss_trajectory" if name == "answer_loss" else name for name in dynamic}
        found, runs = trajectories(inputs["dynamics"], sorted(columns), rows.ids)
        arrays |= {name: found[name] for name in dynamic & found.keys()}
        if "answer_loss" in dynamic:
            losses = found["loss_trajectory"].reshape(len(rows.ids), runs, -1)
            arrays["answer_loss"] = losses[:, :, -1].mean(axis=1)
    for name in sorted(wanted - arrays.keys()):
        arrays[name] = _column(inputs[_HOME.get(name, "given")], name, rows.ids)
    if "difficulty" in needs and difficulty != "given":
        score = difficulty_of(difficulty, Signals(arrays), runs=runs)
        arrays = {name: arrays[name] for name in needs & arrays.keys()} | {"difficulty": score}
    return Signals({name: arrays[name] for name in needs | {"id"}}), runs


def _column(table: Table, name: str, ids: Ints) -> Array:
    try:
        column = table.lookup(ids, columns=["id", name]).column(name)
    except InputError as error:
        raise InputError(
            f"`{table.manifest.name}` does not hold every training row: {error}. Make it from the"
            " same data."
        ) from error
    if pa.types.is_fixed_size_list(column.type):
        return _matrix(column)
    return np.asarray(column.to_numpy())


def _matrix(column: pa.ChunkedArray) -> Array:
    if pa.types.is_float32(column.type.value_type):
        return vectors_of(column)
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.int64).reshape(-1, column.type.list_size)
