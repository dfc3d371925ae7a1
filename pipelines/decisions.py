"""Decisions as tables: the sidecar that says for each row whether it stays, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError, model_validator

from ..errors import InputError, RecipeError
from ..pruners.catalogue import METHODS
from ..pruners.contract import Array, Pruner, Selection
from .engine import ChoosingOptions

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        # Null where no threshold applied, or where the row lost to no other row.
        pa.field("threshold", pa.float32()),
        pa.field("rival", pa.int64()),
    ]
)


# Why a row has no score: an earlier decision dropped it.
BEFORE = "dropped_before"


def spread(n: int, at: npt.NDArray[np.int64], values: Array, rest: object) -> Array:
    """(n,) array with `values` at the places `at` and `rest` elsewhere."""
    made = np.full(n, rest, dtype=values.dtype)
    made[at] = values
    return made


def among_all(made: Selection, n: int, at: npt.NDArray[np.int64]) -> Selection:
    """A selection of the rows at the places `at` as one of all n; the others went before."""
    if len(at) == n:
        return made
    rival = np.where(made.rival < 0, -1, at[np.maximum(made.rival, 0)] if len(at) else -1)
    return Selection(
        keep=spread(n, at, made.keep, False),
        score=spread(n, at, made.score, 0.0),
        reason=spread(n, at, made.reason, len(made.reasons)),
        reasons=(*made.reasons, BEFORE),
        threshold=spread(n, at, made.threshold, np.nan),
        rival=spread(n, at, rival, -1),
        weight=spread(n, at, made.weight, 0.0),
    )


def decision_table(ids: npt.NDArray[np.int64], selection: Selection) -> pa.Table:
    """A selection as rows; `rival` becomes the id of the row lost to."""
    reasons = np.array(selection.reasons, dtype=object)
    rival = ids[np.maximum(selection.rival, 0)] if len(ids) else ids
    return pa.table(
        [
            pa.array(ids, pa.int64()),
            pa.array(selection.keep, pa.bool_()),
            pa.array(selection.score, pa.float32()),
            pa.array(reasons[selection.reason] if len(ids) else [], pa.string()),
            pa.array(selection.threshold, pa.float32(), mask=np.isnan(selection.threshold)),
            pa.array(rival, pa.int64(), mask=selection.rival < 0),
        ],
        schema=SCHEMA,
    )


class MethodOptions(ChoosingOptions):
    """Options of a step that decides: `method`, and beside it that method's own options.

    Subclasses name the units that they decide about. The method's options are checked against
    its dataclass: an unknown one is refused with the known ones named.
    """

    @classmethod
    def units(cls) -> frozenset[str]:
        """Units of the methods that may be named here."""
        return frozenset()

    @classmethod
    def allowed(cls) -> list[str]:
        """Names of the methods that may be named here."""
        return [name for name, method in METHODS.items() if method.unit in cls.units()]

    @classmethod
    def options_of(cls, method: str) -> list[str] | None:
        """The options of a method that may be named here."""
        if method not in cls.allowed():
            return None
        return [field.name for field in dataclasses.fields(METHODS[method])]  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _known(self) -> MethodOptions:
        if self.method not in self.allowed():
            raise ValueError(
                f"unknown method `{self.method}`; known here: {', '.join(self.allowed())}"
            )
        try:
            self.pruner()
        except InputError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def pruner(self, **more: Any) -> Pruner:
        """The method with its options; `more` fills in what the recipe left out."""
        return make_pruner(self.method, {**more, **self.options})


def make_pruner(name: str, options: Mapping[str, Any]) -> Pruner:
    """A method of the catalogue with options read from plain values.

    Raises
    ------
    RecipeError
        The method or an option is unknown, or a value has another type or range.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown method `{name}`; known: {', '.join(METHODS)}.")
    method: Any = METHODS[name]
    fields = [field.name for field in dataclasses.fields(method)]
    hints = get_type_hints(method)
    made: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            raise RecipeError(
                f"unknown option `{key}` of method `{name}`; known: {', '.join(fields)}."
            )
        try:
            made[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise RecipeError(
                f"option `{key}` of method `{name}`: {error.errors()[0]['msg']}; found {value!r}."
            ) from error
    return method(**made)  # type: ignore[no-any-return]
