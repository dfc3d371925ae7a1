"""Tokens by their own perplexity: the baseline without a second model and without neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from ..contract import Budget, Scope, Selection, Signals, Unit, check_choice, check_fraction
from .share import keep_share

Direction = Literal["drop_highest", "drop_lowest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityTokens:
    """Keep the share of every sample's tokens with the lowest loss, or with the highest.

    score = -loss ("drop_highest") or loss ("drop_lowest"), in nats. This is the PPL baseline
    of Q-Tuning's tables (arXiv:2509.23873): its text drops the tokens of high perplexity, an
    early state of its code those of low perplexity, so both directions are here.

    Relations: `qtuning` mixes in the neighbours and spares whole samples; `excess_loss` takes
    off what a reference model finds hard too.

    Attributes
    ----------
    tokens
        Share of each sample's trainable tokens; exactly ceil(tokens * size).
    direction
        Which end of the losses goes.
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) are kept first; they count
        towards the share.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample", "loss"})
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("tokens", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "sample"
    tokens: float = 0.5
    direction: Direction = "drop_highest"
    keep_protected: bool = True

    def __post_init__(self) -> None:
        check_fraction("tokens", self.tokens)
        check_choice("direction", self.direction, get_args(Direction))

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing or not finite."""
        loss = signals.require(self.needs)["loss"]
        highest = self.direction == "drop_highest"
        return keep_share(
            signals,
            np.negative(loss) if highest else loss,
            self.tokens,
            ("low_loss", "high_loss") if highest else ("high_loss", "low_loss"),
            keep_protected=self.keep_protected,
        )
