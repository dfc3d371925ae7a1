"""A window of perplexity: neither the easiest rows nor the strangest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction

REASONS = ("in_window", "below_window", "above_window")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityWindow:
    """Keep the samples whose loss is nearest to the middle of the ranks (arXiv:2309.04564).

    score = -|rank - centre|, where rank is the row's mean place by answer_loss over N - 1, 0
    for the lowest and 1 for the highest; equal losses share a place. Highest kept. The paper
    prunes pretraining text and compares the bottom, the middle and the top; centre 0 and 1
    give the other two. Ranks by loss and by perplexity are the same.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    centre
        Where the window stands among the ranks, 0 to 1.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "answer_loss"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    centre: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_fraction("centre", self.centre)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        loss = signals.require(self.needs)["answer_loss"]
        away = rules.mean_rank(loss) - self.centre
        # Cast before ranking: what is stored must be what was compared.
        score = (-np.abs(away)).astype(np.float32)
        keep, border = rules.top_fraction(score, signals["id"], self.keep)
        reason = np.where(keep, 0, np.where(away < 0, 1, 2)).astype(np.uint8)
        return Selection(keep, score, reason, REASONS, np.full(signals.n, border, np.float32))
