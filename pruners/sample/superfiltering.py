"""Superfiltering: instruction-following difficulty by a small model, as a ratio of perplexities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .ifd import keep_helped


@dataclass(frozen=True, slots=True, kw_only=True)
class Superfiltering:
    """Keep the samples with the highest ratio of perplexities up to 1 (arXiv:2402.00530).

    d = answer_loss - answer_loss_alone in nats is the log of the ratio of the answer's
    perplexities with and without the prompt. score = exp(d) where d is at most 0, highest
    kept; -d above it, where the instruction makes the answer harder: these rank below all
    others, and where the budget reaches down to them the nearest to 0 are kept "in_reserve".

    The losses are meant to come from a small model that was not tuned; which one is of the
    signal. The paper's second stage, facility location for diversity, is not here: follow
    with `k_center` or `near_duplicate`.

    Relations: `ifd` takes the ratio of the losses, which weighs a nat the more the easier the
    answer is alone.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "answer_loss", "answer_loss_alone"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        alone = signals["answer_loss_alone"].astype(np.float64)
        log_ratio = signals["answer_loss"] - alone
        score = np.where(log_ratio > 0.0, -log_ratio, np.exp(np.minimum(log_ratio, 0.0)))
        return keep_helped(signals, score, log_ratio > 0.0, self.keep)
