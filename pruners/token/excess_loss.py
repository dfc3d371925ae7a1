"""Rho-1: the tokens that a reference model finds easier than the model in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..contract import Budget, Scope, Selection, Signals, Unit, check_choice, check_fraction
from .share import excess, keep_share, keep_share_of_table

Over = Literal["sample", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcessLoss:
    """Keep the tokens whose loss exceeds a reference model's the most (Rho-1, arXiv:2404.07965).

    score = loss - reference_loss, in nats; highest kept. The reference is a model trained on
    clean data; what it finds hard too is taken for noise.

    Departure: the paper ranks inside a training batch; here the ranks are inside each sample,
    or over the table. Either way the scope is the table, so that no shard changes a choice.

    Measured (benchmarks/RESULTS.md): chosen once, from a small Llama's scores, it lost to random
    tokens at the same budget on both of two sets, by 0.08 to 0.38 nats of held-out loss.

    Relations: `token_cleaning` is the same difference with the table's ranks and another
    recipe for the two models; `sstoken` takes the model's own past for the reference and turns
    the sign.

    Attributes
    ----------
    tokens
        Share of the trainable tokens; exactly ceil(tokens * size) of each sample, or of the
        table.
    over
        Where the ranks are taken: "sample" or "table".
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) are kept first and count
        towards the share; over the table, in every sample of which anything is kept.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "sample", "loss", "reference_loss"})
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("tokens", "fraction_per_group")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = "sample"
    tokens: float = 0.6
    over: Over = "sample"
    keep_protected: bool = True

    def __post_init__(self) -> None:
        check_fraction("tokens", self.tokens)
        check_choice("over", self.over, get_args(Over))

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        share = keep_share if self.over == "sample" else keep_share_of_table
        return share(
            signals,
            excess(signals),
            self.tokens,
            ("high_excess_loss", "low_excess_loss"),
            keep_protected=self.keep_protected,
        )
