"""Random tokens of each sample: what a token method must beat at the same budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .share import keep_share


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokens:
    """Keep a random share of the trainable tokens of every sample.

    score = a uniform number drawn from (seed, id): order, shards and engine do not change it,
    and a larger `tokens` with the same seed keeps a superset.

    Relations: `random` draws whole samples; the two together are the control that joint
    methods are held against.

    Attributes
    ----------
    tokens
        Share of each sample's trainable tokens; exactly ceil(tokens * size).
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) are kept first; they count
        towards the share.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample"})
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("tokens", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "sample"
    tokens: float = 0.5
    keep_protected: bool = True

    def __post_init__(self) -> None:
        check_fraction("tokens", self.tokens)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing."""
        ids = signals.require(self.needs)["id"]
        # Cast before ranking: what is stored must be what was compared.
        score = rules.uniform(seed, ids).astype(np.float32)
        return keep_share(
            signals,
            score,
            self.tokens,
            ("drawn", "not_drawn"),
            keep_protected=self.keep_protected,
        )
