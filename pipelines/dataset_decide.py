"""A method's decision about the training rows of a data set, at one budget or at many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import model_validator

from ..errors import PruneryError, RecipeError
from ..pruners.balance import Balance, balanced
from ..pruners.catalogue import METHODS
from ..pruners.contract import Pruner, Selection, Signals
from ..pruners.sample.difficulty import DIFFICULTY
from ..pruners.sample.random import Random
from ..pruners.strata import stratified
from .dataset_signals import Rows, gather
from .dataset_tables import DATASET_DECISION
from .decisions import MethodOptions, among_all, decision_table
from .tables import among, kept_ids

if TYPE_CHECKING:
    from ..storage import Table

# Kinds of budget that name a share of rows, so that a curve over shares can be drawn.
SHARES = ("fraction", "fraction_per_group")


class DecideOptions(MethodOptions):
    """A method over rows with its own options, and what holds over any method.

    Attributes
    ----------
    difficulty
        What methods that need a `difficulty` (ccs, d2) are given: el2n, grand, forgetting, aum,
        loss, dyn_unc or memorisation, or "given" for a column of that name in the input `given`.
    by
        "class" or "group": decide inside each on its own, so that each meets the budget.
    balance
        What `floor` and `cap` hold for: "class" or "group".
    floor, cap
        See `pruners.balance.Balance`; for methods whose budget is a share of the rows.
    """

    method: str = "ccs"
    difficulty: str = "aum"
    by: Literal["class", "group"] | None = None
    balance: Literal["class", "group"] = "class"
    floor: float = 0.0
    cap: float | None = None

    @classmethod
    def units(cls) -> frozenset[str]:
        """Methods that decide about whole rows."""
        return frozenset({"sample"})

    @model_validator(mode="after")
    def _fit_together(self) -> DecideOptions:
        known = [*DIFFICULTY, "given"]
        if self.difficulty not in known:
            raise ValueError(f"unknown difficulty `{self.difficulty}`; known: {', '.join(known)}")
        try:
            balance = self.limits()
        except PruneryError as error:
            raise ValueError(str(error).rstrip(".")) from error
        if balance is not None and METHODS[self.method].budget.kind not in SHARES:
            raise ValueError(
                "`floor` and `cap` need a method whose budget is a share of the rows;"
                f" `{self.method}` keeps what is above a threshold. Take them out, or use `by`"
            )
        return self

    def limits(self) -> Balance | None:
        """The balance asked for, or None."""
        balance = Balance(self.floor, self.cap)
        return None if balance == Balance() else balance

    def identity(self) -> dict[str, Any]:
        """What enters the key of a decision."""
        return {
            "method": self.method,
            "options": self.options,
            "made": repr(self.pruner()),
            "difficulty": self.difficulty if "difficulty" in self.pruner().needs else "",
            "by": self.by,
            "balance": [self.balance, self.floor, self.cap] if self.limits() else None,
        }


@dataclass(frozen=True)
class Decider:
    """A method with the signals of the rows: any number of decisions without a model.

    Attributes
    ----------
    rows
        N training rows.
    candidates
        (M,) numbers of the rows that an earlier decision left; only they are shown to the
        method, and shares are of them.
    signals
        Of the candidates.
    runs
        Training runs in the trajectories.
    """

    options: DecideOptions
    rows: Rows
    candidates: npt.NDArray[np.int64]
    signals: Signals
    runs: int

    @classmethod
    def of(cls, options: DecideOptions, inputs: Mapping[str, Table], rows: Rows) -> Decider:
        """Read the signals that the method needs. Raises as `gather`."""
        candidates = np.arange(len(rows.ids))
        if "after" in inputs:
            candidates = np.flatnonzero(among(rows.ids, kept_ids(inputs["after"])))
        needs = options.pruner().needs
        left = rows.take(candidates)
        signals, runs = gather(needs, inputs, left, difficulty=options.difficulty)
        return cls(options, rows, candidates, signals, runs)

    def select(self, *, seed: int, keep: float | None = None) -> Selection:
        """The method's selection of the N rows; `keep` replaces its own share.

        Raises
        ------
        RecipeError
            `keep` is given and the method's budget is no share of the rows.
        BudgetError
            The floor cannot be met.
        """
        more = {"runs": self.runs} if "runs" in _options_of(self.options.method) else {}
        pruner = self.options.pruner(**more)
        if keep is not None:
            pruner = _with_share(pruner, self.options, keep, more)
        return self._limited(pruner, seed)

    def random(self, *, seed: int, keep: float) -> Selection:
        """The control: candidates drawn at the same share, under the same `by`, floor and cap."""
        return self._limited(Random(keep=keep), seed)

    def _limited(self, pruner: Pruner, seed: int) -> Selection:
        options, left = self.options, self.rows.take(self.candidates)
        if options.by is None:
            made = pruner(self.signals, seed=seed)
        else:
            made = stratified(pruner, self.signals, _codes(left, options.by), seed=seed)
        limits = options.limits()
        if limits is not None:
            made = balanced(made, left.ids, _codes(left, options.balance), limits)
        return among_all(made, len(self.rows.ids), self.candidates)


def _codes(rows: Rows, what: str) -> npt.NDArray[np.int64]:
    return rows.label if what == "class" else rows.group


def _options_of(method: str) -> set[str]:
    return {field.name for field in fields(METHODS[method])}  # type: ignore[arg-type]


def _with_share(
    pruner: Pruner, options: DecideOptions, keep: float, more: Mapping[str, Any]
) -> Pruner:
    if pruner.budget.kind not in SHARES:
        raise RecipeError(
            f"a curve over kept fractions needs a method whose budget is a share of the rows;"
            f" `{options.method}` keeps what is above the threshold `{pruner.budget.field}`."
        )
    changed = {**options.options, pruner.budget.field: keep}
    made: Pruner = options.model_copy(update={"options": changed}).pruner(**more)
    return made


def decision_rows(rows: Rows, selection: Selection) -> pa.Table:
    """Rows of `DATASET_DECISION`, in the order of the training rows."""
    made = decision_table(rows.ids, selection)
    weight = pa.array(selection.weight, pa.float32())
    return pa.Table.from_arrays([*made.columns, weight], schema=DATASET_DECISION)


def empty_classes(rows: Rows, selection: Selection) -> list[str]:
    """Names of the classes that had training rows and have none left."""
    had = np.bincount(rows.label, minlength=len(rows.classes)) > 0
    left = np.bincount(rows.label[selection.keep], minlength=len(rows.classes)) > 0
    return [rows.classes[code] for code in np.flatnonzero(had & ~left)]
