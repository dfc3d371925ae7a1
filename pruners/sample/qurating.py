"""QuRating: rows by a rater's score, the best ones or a draw that favours them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import InputError
from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .best import keep_best


@dataclass(frozen=True, slots=True, kw_only=True)
class QuRating:
    """Keep the highest rated rows, or draw them by rating (QuRating, arXiv:2402.09739).

    score = rating + temperature * g, highest kept, with g = -log(-log(u)) a Gumbel number and
    u drawn from (seed, id): the rows kept are then a draw without replacement in which each
    next row is taken with probability proportional to exp(rating / temperature), as published
    (in the Gumbel form of Kool et al. 2019). Temperature 0 keeps the top. The paper first
    scales ratings to mean 0 and deviation 1 over the corpus; do so before, or read the
    temperature in the rating's own unit.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    temperature
        In units of the rating; 0 is top-k, larger comes nearer to `random`.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "rating"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"`temperature` must be 0 or more, and finite; found {self.temperature}."
            )

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        score = signals.require(self.needs)["rating"].astype(np.float64)
        if self.temperature:
            drawn = rules.uniform(seed, signals["id"])
            score = score - self.temperature * np.log(-np.log(drawn))
        # Cast before ranking: what is stored must be what was compared.
        return keep_best(signals, score.astype(np.float32), self.keep, ("high", "low"))
