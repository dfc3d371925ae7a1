"""Token Cleaning: one ranking of all tokens by how much a reference model improves on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction
from .share import excess, keep_share_of_table


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCleaning:
    """Keep the tokens that a reference model improves the most (arXiv:2502.01968).

    score = loss - reference_loss, in nats; highest kept, over the whole table (Token Cleaning
    with its fixed reference). `loss` is the base model's; the reference is the base fine-tuned
    on a small part of the data.

    The ranking is global: a sample may lose every token. Its self-evolving variant, a chain of
    references, is not here.

    Relations: `excess_loss` ranks inside each sample.

    Attributes
    ----------
    tokens
        Share of the table's trainable tokens; exactly ceil(tokens * N), and a few protected
        ones more where the border falls between them and the rest of their sample.
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) of every sample of which
        anything is kept are kept; they count towards the share.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample", "loss", "reference_loss"})
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("tokens", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    tokens: float = 0.6
    keep_protected: bool = True

    def __post_init__(self) -> None:
        check_fraction("tokens", self.tokens)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing or not finite."""
        return keep_share_of_table(
            signals.require(self.needs),
            excess(signals),
            self.tokens,
            ("high_excess_loss", "low_excess_loss"),
            keep_protected=self.keep_protected,
        )
