"""DSLR: each sentence reranked by itself with a cross-encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Dslr:
    """Keep sentences that a cross-encoder, reading each alone, finds relevant (arXiv:2407.03627).

    score = sigmoid(logit of (question, title and sentence)), kept iff score > threshold; the
    paper's sentence-level re-ranking with reconstruction in the order of the text. Which
    cross-encoder gives the logits is up to whoever computes the signal.

    Relations: `provence` reads the whole passage in one pass, this one runs a pass for every
    sentence and loses what stands in the sentences around it.

    Attributes
    ----------
    threshold
        0 to 1; higher keeps less. Depends on the cross-encoder.
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "cross_encoder_logit"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("threshold", "threshold")
    scope: ClassVar[Scope] = "row"
    group: ClassVar[str | None] = None
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        logit = signals["cross_encoder_logit"].astype(np.float64)
        score = (0.5 * (1.0 + np.tanh(0.5 * logit))).astype(np.float32)
        keep = rules.above(score, self.threshold)
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("relevant", "below_threshold"),
            np.full(len(score), self.threshold, np.float32),
        )
