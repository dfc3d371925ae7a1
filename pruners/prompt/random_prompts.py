"""Random words: what a pruned vocabulary must beat at the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction, empty_selection

_REASONS = ("drawn", "not_drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPrompts:
    """Keep random words, exactly as many as `claps` at the same `keep`.

    The score is a uniform number drawn from (seed, id), so order, shards and engine do not
    change it, and a larger `keep` with the same seed keeps a superset.

    Departures: the published control keeps int(N * (100 - q) / 100) words, one fewer than the
    pruned set wherever that is no whole number (186 against 187 of 1,867 at q = 90).

    Attributes
    ----------
    keep
        Fraction of words to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "prompt"
    needs: ClassVar[frozenset[str]] = frozenset({"id"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N words; raises InputError where `id` is missing."""
        ids = signals.require(self.needs)["id"]
        if len(ids) == 0:
            return empty_selection(_REASONS)
        # Cast before ranking: what is stored must be what was compared.
        score = rules.uniform(seed, ids).astype(np.float32)
        keep, border = rules.top_fraction(score, ids, self.keep)
        return Selection(
            keep, score, (~keep).astype(np.uint8), _REASONS, np.full(len(ids), border, np.float32)
        )
