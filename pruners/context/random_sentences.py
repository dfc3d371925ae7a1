"""Random sentences of each passage: what a context method must beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSentences:
    """Keep a random share of the sentences of every passage.

    score = a uniform number drawn from (seed, id): order, shards and engine do not change it,
    and a larger `keep` with the same seed keeps a superset.

    Relations: `random` draws from the whole table, this one inside passages.

    Attributes
    ----------
    keep
        Share of each passage's sentences; exactly ceil(keep * sentences).
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "passage"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "passage"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing."""
        ids = signals.require(self.needs)["id"]
        # Cast before ranking: what is stored must be what was compared.
        score = rules.uniform(seed, ids).astype(np.float32)
        keep = rules.top_fraction_by_group(score, ids, signals["passage"], self.keep)
        return Selection(keep, score, (~keep).astype(np.uint8), ("drawn", "not_drawn"))
