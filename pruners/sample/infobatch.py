"""InfoBatch: skip some of the easy rows at random and weigh the rest of them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction

REASONS = ("hard", "easy_drawn", "easy_not_drawn")
# Above any number drawn, so that a hard row passes every ratio.
_ALWAYS = np.float32(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoBatch:
    """Drop easy samples by chance and weigh up the easy ones that stay (arXiv:2303.04947).

    A row is easy where answer_loss, in nats, is below the table's mean. score = a uniform
    number drawn from (seed, id) for an easy row and 2 for any other; kept where score >
    ratio. So each easy row goes with probability `ratio`, every other one stays. `weight` of
    an easy row that stays is 1 / (1 - ratio): the expected gradient is that of the whole
    table. Other rows weigh 1.

    One call is one epoch's draw: give each epoch another seed. That the last 12.5 % of
    training take the whole data, and that the weights reach the loss, is the trainer's part.

    Attributes
    ----------
    ratio
        Probability that an easy row is dropped, the paper's r, 0 to 1; higher drops more. At
        1 all easy rows go and no weight can make up for them.
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "answer_loss"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("ratio", "threshold")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite."""
        ids, loss = signals.require(self.needs)["id"], signals["answer_loss"].astype(np.float64)
        # In the order of ids, so that the sum's last bit does not hang on the order of rows.
        mean = loss[np.argsort(ids)].mean() if len(loss) else 0.0
        easy = loss < mean
        score = np.where(easy, rules.uniform(seed, ids), _ALWAYS).astype(np.float32)
        keep = rules.above(score, self.ratio)
        weight = np.where(easy & keep, 1.0 / max(1.0 - self.ratio, 1e-9), 1.0)
        return Selection(
            keep,
            score,
            np.where(keep, np.where(easy, 1, 0), 2).astype(np.uint8),
            REASONS,
            np.full(len(ids), self.ratio, np.float32),
            weight=np.where(keep, weight, 0.0).astype(np.float32),
        )
