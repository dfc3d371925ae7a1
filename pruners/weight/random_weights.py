"""Random weights: what every method must beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_fraction,
)
from .weight_selection import keep_of_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeights:
    """Keep random weights of a matrix, each as likely as any other.

    score = a uniform number drawn from (seed, id); in a model the id is the weight's position in
    its matrix and the seed is mixed with the matrix's name. With `erk.erk_densities` over the
    matrices it is the ERK baseline (arXiv:1911.11134).

    Relations: the control of every weight method.

    Attributes
    ----------
    keep
        Share of the matrix's weights to keep; sparsity is 1 - keep.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({"id"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, seed: int, ids: IntArray) -> FloatArray:
        """A uniform number for each id (N,) int64, (N,) float32."""
        return rules.uniform(seed, ids).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights of one matrix; raises InputError where `id` is missing."""
        ids = signals.require(self.needs)["id"]
        score = self.importance(seed=seed, ids=ids)
        return keep_of_matrix(signals, score, self.keep, ("drawn", "not_drawn"))
