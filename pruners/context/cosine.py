"""Embedding cosine: the sentences that point the way the question does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """Keep the sentences whose embedding is nearest to the question's, a share of each passage.

    score = cosine(embedding of the question, embedding of the sentence alone). The bi-encoder
    form of RECOMP's extractive compressor (arXiv:2310.04408, section 3.1), with any sentence
    encoder and the cosine in place of Contriever's dot product, and a share of the sentences in
    place of a fixed number.

    Relations: `dslr` reads question and sentence together, `provence` the whole passage.

    Attributes
    ----------
    keep
        Share of each passage's sentences; exactly ceil(keep * sentences).
    """

    unit: ClassVar[Unit] = "sentence"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "passage", "question_similarity"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "passage"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N sentences; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        score = signals["question_similarity"]
        keep = rules.top_fraction_by_group(score, signals["id"], signals["passage"], self.keep)
        return Selection(keep, score, (~keep).astype(np.uint8), ("near_question", "far"))
