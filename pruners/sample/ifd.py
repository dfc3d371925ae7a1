"""Instruction-following difficulty: how little the instruction helps with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .. import rules
from ..contract import Budget, FloatArray, Scope, Selection, Signals, Unit, check_fraction

REASONS = ("difficult", "in_reserve", "easy", "instruction_does_not_help")
_DIFFICULT, _RESERVE, _EASY, _UNHELPED = range(len(REASONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ifd:
    """Keep the samples whose instruction helps the answer the least, yet helps (arXiv:2308.12032).

    ratio = answer_loss / answer_loss_alone, mean losses in nats with and without the prompt.
    score = ratio where it is at most 1, highest kept; -ratio above 1, where the instruction
    makes the answer harder, as if the two did not belong together. So these rank below all
    others, as the paper drops them, and the budget still holds: where it reaches down to
    them, the ones nearest to 1 are kept "in_reserve".

    An answer that costs nothing alone has ratio 0 where it costs nothing with the prompt
    either, and counts as above 1 otherwise.

    Measured (benchmarks/RESULTS.md), by held-out loss at equal trained tokens: better than random
    samples on mixed instructions at 12.5 %, level with them beyond, worse on grade-school maths.

    Relations: `superfiltering` takes the ratio of perplexities.

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
        loss = signals["answer_loss"].astype(np.float64)
        alone = signals["answer_loss_alone"].astype(np.float64)
        ratio = loss / np.maximum(alone, 1e-12)
        score = np.where(ratio <= 1.0, ratio, -np.minimum(ratio, np.finfo(np.float32).max))
        return keep_helped(signals, score, ratio > 1.0, self.keep)


def keep_helped(
    signals: Signals, score: npt.NDArray[np.float64], unhelped: npt.NDArray[np.bool_], keep: float
) -> Selection:
    """Keep ceil(keep * N) rows by score (N,), where the unhelped ones score below all others."""
    # Cast before ranking: what is stored must be what was compared.
    stored: FloatArray = score.astype(np.float32)
    kept, border = rules.top_fraction(stored, signals["id"], keep)
    reason = np.where(
        kept, np.where(unhelped, _RESERVE, _DIFFICULT), np.where(unhelped, _UNHELPED, _EASY)
    )
    threshold = np.full(signals.n, border, np.float32)
    return Selection(kept, stored, reason.astype(np.uint8), REASONS, threshold)
