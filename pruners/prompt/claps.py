"""ClaPS: the words that change a model's answers for the better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, Scope, Selection, Signals, Unit, check_fraction, empty_selection

_REASONS = ("influential", "less_influential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claps:
    """Keep the words whose influence as a prompt is highest (ClaPS, arXiv:2310.12774).

    score = the signal `prompt_influence`: the reward with the word alone as the prompt minus
    that with the empty prompt, or the divergence between the two. What is kept is the space
    that a search then combines words in.

    Departures: the published rule keeps what lies strictly above numpy's percentile (q = 90 in
    its script, 99 by default), which keeps nothing where the scores are tied; here it is exactly
    ceil(keep * N) words, ties to the smaller id. keep=0.1 is q = 90.

    Relations: `random_prompts` is the control of exactly the same size.

    Measured (benchmarks/RESULTS.md; six few-shot tasks, a sentence encoder, 1,000 prompts, mean
    of four searches): +0.8 +- 0.8 points of test accuracy over as many random words, +1.0 +- 0.7
    over the whole space. Where the queries of the influence pass are given to the search instead,
    one genetic search does as well without it: pruning pays where its words are used again.

    Attributes
    ----------
    keep
        Fraction of words to keep; exactly ceil(keep * N).
    """

    unit: ClassVar[Unit] = "prompt"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "prompt_influence"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N words; raises InputError where `prompt_influence` is missing."""
        arrays = signals.require(self.needs)
        ids, score = arrays["id"], arrays["prompt_influence"]
        if len(ids) == 0:
            return empty_selection(_REASONS)
        keep, border = rules.top_fraction(score, ids, self.keep)
        return Selection(
            keep, score, (~keep).astype(np.uint8), _REASONS, np.full(len(ids), border, np.float32)
        )
