"""What `el2n` and `grand` share: a signal's mean over some epochs of each run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ...errors import InputError
from ..contract import (
    Array,
    Budget,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_count,
    check_fraction,
)
from ..trajectory import by_run, epoch_mean, run_mean
from .difficulty import Order, check_order, keep_by_order

Reduce = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochScore:
    """Mean or sum of `signal` over some epochs of each run, then the mean over runs.

    Higher = harder. Those who inherit name the signal; no method by itself.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    signal: ClassVar[str]
    keep: float = 0.5
    order: Order = "hard"
    first_epoch: int = 0
    last_epoch: int | None = None
    reduce: Reduce = "mean"
    runs: int = 1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_order(self.order)
        check_count("first_epoch", self.first_epoch)
        if self.last_epoch is not None:
            check_count("last_epoch", self.last_epoch, low=self.first_epoch)
        check_choice("reduce", self.reduce, get_args(Reduce))
        check_count("runs", self.runs, low=1)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite.

        So does a range of epochs that the runs do not have.
        """
        values = signals.require(self.needs)[self.signal]
        part = self._epochs(by_run(self.signal, values, self.runs))
        means = epoch_mean(part)
        difficulty = run_mean(means * part.shape[2] if self.reduce == "sum" else means)
        return keep_by_order(signals, difficulty, self.keep, self.order)

    def _epochs(self, values: Array) -> Array:
        """The epochs asked for, (N, runs, those), of all (N, runs, epochs)."""
        epochs = values.shape[2]
        end = epochs if self.last_epoch is None else self.last_epoch + 1
        if not self.first_epoch < end <= epochs:
            last = "the last" if self.last_epoch is None else self.last_epoch
            raise InputError(
                f"epochs {self.first_epoch} to {last} of `{self.signal}` were asked for; found"
                f" {epochs} epochs a run, counted from 0. Set `first_epoch` and `last_epoch`"
                " within them."
            )
        return values[:, :, self.first_epoch : end]
