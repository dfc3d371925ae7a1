"""Random rows: the method that every other one must beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Keep a random fraction of the rows, each as likely as any other.

    The score is a uniform number drawn from (seed, id), so order, shards and engine do not
    change it, and a larger `keep` with the same seed keeps a superset.

    Relations: the baseline of every sample method; `random_sentences` draws inside passages.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where `id` is missing."""
        ids = signals.require(self.needs)["id"]
        # Cast before ranking: what is stored must be what was compared.
        score = rules.uniform(seed, ids).astype(np.float32)
        keep, border = rules.top_fraction(score, ids, self.keep)
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("drawn", "not_drawn"),
            np.full(len(ids), border, np.float32),
        )
