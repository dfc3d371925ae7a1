"""The first sentences of each passage: the baseline that news and encyclopaedias make strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_count


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstK:
    """Keep the first k sentences of every passage (the Lead baseline of summarisation).

    score = -position, so that a larger k keeps a superset. Sees neither question nor text.

    Relations: with `random_sentences`, what any scored method has to beat.

    Attributes
    ----------
    k
        Sentences of each passage; exactly min(k, sentences).
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "passage", "position"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("k", "count_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "passage"
    k: int = 3

    def __post_init__(self) -> None:
        check_count("k", self.k)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing."""
        signals.require(self.needs)
        score = -signals["position"].astype(np.float32)
        keep = rules.top_count_by_group(score, signals["id"], signals["passage"], self.k)
        return Selection(keep, score, (~keep).astype(np.uint8), ("early", "late"))
