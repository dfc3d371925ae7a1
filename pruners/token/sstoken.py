"""ssToken: tokens that the model already improves on and that look back at the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..contract import Budget, IntArray, Scope, Selection, Signals, Unit, check_fraction
from ..ragged import Float64Array, Grouped, by_group
from .share import keep_share


@dataclass(frozen=True, slots=True, kw_only=True)
class SsToken:
    """Keep tokens that improve and look back at the prompt (ssToken, arXiv:2510.18250).

    score = gamma * R + (1 - gamma) * A, where R = history_loss - loss (nats; how much the
    model has improved on its earlier self), stretched to 0 to 1 inside the sample, and A =
    the attention that the token's own query pays to the prompt, a mass in 0 to 1 that is taken
    as it is. Highest kept.

    Departure: the published code divides by the range of R plus 1e-8. Where R is constant but
    for rounding, which it is before the first update, that turns rounding into the whole
    score. Here R counts 0.5 throughout a sample whose range is below 1e-6 nats.

    Of the signals, not of this method: the layer, and whether the first tokens (an attention
    sink) count as prompt. Of the trainer: gamma = 0 for a warm-up, while R says little yet.

    Measured (benchmarks/RESULTS.md): chosen once, from a small Llama's scores, it lost to random
    tokens at the same budget on both of two sets, by 0.17 to 0.48 nats of held-out loss.

    Relations: `excess_loss` has the opposite sign and needs a second model.

    Attributes
    ----------
    tokens
        Share of each sample's trainable tokens, the paper's rho; exactly ceil(tokens * size).
    gamma
        Weight of the excess loss against attention, 0 to 1.
    detrend
        Take off the attention that the place alone explains: the least-squares line on
        1 / (token_position + 1) inside the sample, its mean left in. A token that looks at all
        before it alike pays the prompt a mass that falls with its place just so. Off as
        published.
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) are kept first; they count
        towards the share.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "sample", "token_position", "loss", "history_loss", "prompt_attention"}
    )
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("tokens", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "sample"
    tokens: float = 0.6
    gamma: float = 0.5
    detrend: bool = False
    keep_protected: bool = True

    def __post_init__(self) -> None:
        check_fraction("tokens", self.tokens)
        check_fraction("gamma", self.gamma)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        run = by_group(signals["sample"], signals["token_position"])
        loss = signals["loss"][run.order].astype(np.float64)
        attention = signals["prompt_attention"][run.order].astype(np.float64)
        if self.detrend:
            attention = without_trend(attention, signals["token_position"][run.order], run)
        improved = run.unit_range(signals["history_loss"][run.order] - loss)
        # Cast before ranking: what is stored must be what was compared.
        score = np.empty(signals.n, np.float32)
        score[run.order] = self.gamma * improved + (1.0 - self.gamma) * attention
        return keep_share(
            signals,
            score,
            self.tokens,
            ("high_score", "low_score"),
            keep_protected=self.keep_protected,
        )


def without_trend(attention: Float64Array, position: IntArray, run: Grouped) -> Float64Array:
    """Attention (N,) less its least-squares line on 1 / (position + 1), sample by sample."""
    place = 1.0 / (position + 1.0)
    place = place - run.mean(place)[run.owner]
    spread = run.mean(place**2)
    slope = run.mean(place * attention) / np.where(spread > 0, spread, 1.0)
    return np.asarray(attention - slope[run.owner] * place, np.float64)
