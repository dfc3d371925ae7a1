"""Random rows of every class: the baseline that keeps the balance of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class StratifiedRandom:
    """Keep a random share of the rows of every class.

    score = a uniform number drawn from (seed, id): order, shards and engine do not change it, and a
    larger `keep` with the same seed keeps a superset. No class that has a row is left empty
    unless `keep` is 0.

    Relations: `random` draws from the whole table with the same numbers.

    Attributes
    ----------
    keep
        Share of each class's rows; exactly ceil(keep * rows).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "label"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "label"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not legal."""
        ids = signals.require(self.needs)["id"]
        # Cast before ranking: what is stored must be what was compared.
        score = rules.uniform(seed, ids).astype(np.float32)
        keep = rules.top_fraction_by_group(score, ids, signals["label"], self.keep)
        return Selection(keep, score, (~keep).astype(np.uint8), ("drawn", "not_drawn"))
