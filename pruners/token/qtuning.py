"""Q-Tuning: samples by error and uncertainty, then the tokens of the misconceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from .. import ragged, rules
from ..contract import (
    BoolArray,
    Budget,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_choice,
    check_count,
    check_fraction,
    empty_selection,
)
from ..ragged import Float64Array, Grouped
from .plane import (
    CALIBRATION,
    MISCONCEPTION,
    NOISY,
    Normalise,
    Plane,
    Search,
    correlation,
    decide,
    pools,
)
from .share import held_by, protected_tokens

TokenBudget = Literal["per_sample", "pool"]
Direction = Literal["drop_highest", "drop_lowest"]

REASONS = (
    "calibration",
    "misconception",
    "protected",
    "high_local_perplexity",
    "low_local_perplexity",
    "noise",
    "redundant",
    "over_budget",
)
_WHOLE, _PART, _PROTECTED, _HIGH, _LOW, _NOISE, _REDUNDANT, _OVER = range(len(REASONS))
_LEVELS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class QTuning:
    """Keep uncertain easy samples whole and sure wrong ones in part (Q-Tuning, arXiv:2509.23873).

    Samples: error = mean loss (the log of equation 4; places and quantiles are the same),
    uncertainty = mean entropy (equation 5), over the trainable tokens, in nats. Thresholds at
    the alpha and 1 - alpha quantiles of both axes open from the corners until enough samples
    stand in quadrant 2 (error high, uncertainty low: misconceptions) or 4 (the reverse:
    calibration). Where the two axes correlate, as they do, even the loosest thresholds hold
    too few; the rest is filled by the largest |x - y|, x and y the normalised axes, as
    quadrant 2 where x >= y and else as 4. A dropped sample beyond the search's reach is called
    noise or redundant by the sum of its ranks.

    Tokens of quadrant 2 (equation 7): s_i = (1 - mix) p_i + mix (p_{i-1} + p_{i+1}), p = the
    token's perplexity, exp(loss); worked in logs, so that nothing overflows. The highest s_i
    go. Neighbours outside the turn, the sample or the trainable tokens count 0. Quadrant 4 is
    kept whole.

    score orders the tokens: first by the sample's place on the plane in 255 steps, then inside
    the sample by the rule, protected tokens first; 0 to 1, higher = kept longer. It does not
    depend on the budget. Answers above 32,768 tokens may share a score.

    Departures. "exact", the default search, is the limit of the published one with the count
    met: samples enter in the order in which opening thresholds reach them (none beyond alpha =
    0.49), and exactly ceil(samples * pool) stay, where the published search stops near the
    target and never trims. It is monotone in `samples`. Plane and quantiles are those of the
    table or of a large pool, where the paper takes each batch of 8. The paper's text also says
    that the top s_i are retained; its tables and figures drop them, and so does this. A
    constant axis counts 0.5. A budget of tokens never takes a kept sample's last token.

    Measured (benchmarks/RESULTS.md): chosen once, from a small Llama's scores, it did not beat a
    random choice of as many tokens on either of two sets; held-out loss was 0.009 to 0.023 nats
    a token higher at 12.5 to 50 %. The paper chooses anew at every step of larger models.

    Relations: `perplexity_tokens` is the token rule with mix = 0 in every sample; with `random`
    and `random_tokens` for control.

    Attributes
    ----------
    samples
        Share of the samples of a pool that keep a token: exactly ceil(samples * size).
    tokens
        Share of the tokens: of each quadrant 2 sample floor(tokens * size), never below one
        ("per_sample"), or of the pool's tokens `samples` * `tokens` ("pool").
    pool
        Samples to a pool; None is the whole table. Pools are drawn from (seed, sample id).
    normalise
        Axes of the supplement score: "minmax" of perplexity and entropy (published), "log"
        (min-max of log perplexity), "rank".
    search
        "exact", or "published" (bisection of at most 10 steps, near the target, not monotone).
    token_budget
        "per_sample" (the paper's text) or "pool" (its early code: tokens of dropped samples
        count, the rest is cut from the pool's quadrant 2, worst first; not monotone).
    mix
        Weight of the neighbours, the paper's lambda, 0 to 1.
    direction
        Which local perplexities go: "drop_highest", or "drop_lowest" (the paper's reversed
        ablation).
    keep_protected
        End-of-sequence and end-of-turn tokens (signal `protected`) of kept samples are kept;
        they count towards the budget.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "sample", "token_position", "turn", "loss", "entropy"}
    )
    optional: ClassVar[frozenset[str]] = frozenset({"protected"})
    budget: ClassVar[Budget] = Budget("samples", "fraction_of_groups")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = "sample"
    samples: float = 0.5
    tokens: float = 0.5
    pool: int | None = None
    normalise: Normalise = "minmax"
    search: Search = "exact"
    token_budget: TokenBudget = "per_sample"
    mix: float = 0.5
    direction: Direction = "drop_highest"
    keep_protected: bool = True

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "mix"):
            check_fraction(name, getattr(self, name))
        if self.pool is not None:
            check_count("pool", self.pool, low=1)
        for name, known in (
            ("normalise", Normalise),
            ("search", Search),
            ("token_budget", TokenBudget),
            ("direction", Direction),
        ):
            check_choice(name, getattr(self, name), get_args(known))

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N tokens; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        if not signals.n:
            return empty_selection(REASONS)
        run = ragged.by_group(signals["sample"], signals["token_position"])
        plane, pool = self._plane(signals, run, seed)
        protected = protected_tokens(signals, self.keep_protected)[run.order]
        ids = signals["id"][run.order]
        worth = local_perplexity(signals, run, self.mix)
        if self.direction == "drop_highest":
            worth = -worth
        rank = rules.rank_in_group(worth, ids, run.owner, first=protected)
        in_part = plane.kept & (plane.quadrant == MISCONCEPTION)
        held = held_by(run.owner, protected, len(run.sizes))
        if self.token_budget == "per_sample":
            quota = np.maximum(rules.counts_of(run.sizes, self.tokens, rounded="down"), 1)
            keep = rank < np.where(in_part, np.maximum(quota, held), run.sizes)[run.owner]
        else:
            free = in_part[run.owner] & (rank >= np.maximum(held, 1)[run.owner])
            keep = ~self._cut(worth, ids, free, pool[run.owner], plane.kept[run.owner])
        keep &= plane.kept[run.owner]
        out_keep = np.empty(signals.n, np.bool_)
        out_keep[run.order] = keep
        reason = np.empty(signals.n, np.uint8)
        reason[run.order] = self._reasons(plane, run.owner, keep, protected)
        score = np.empty(signals.n, np.float32)
        inside = (run.sizes[run.owner] - 1 - rank) / run.sizes[run.owner]
        score[run.order] = (np.floor(plane.score * _LEVELS)[run.owner] + inside) / (_LEVELS + 1)
        return Selection(out_keep, score, reason, REASONS)

    def plane(self, signals: Signals, *, seed: int) -> Plane:
        """The samples on the plane and what was decided for them; raises as the call does."""
        signals.require(self.needs)
        run = ragged.by_group(signals["sample"], signals["token_position"])
        return self._plane(signals, run, seed)[0]

    def _plane(self, signals: Signals, run: Grouped, seed: int) -> tuple[Plane, IntArray]:
        """The plane, and the number of each sample's pool (S,)."""
        error = run.mean(signals["loss"][run.order])
        uncertainty = run.mean(signals["entropy"][run.order])
        pool = pools(run.groups, self.pool, seed)
        quadrant = np.zeros(len(pool), np.uint8)
        score = np.zeros(len(pool))
        kept, topped_up = np.zeros(len(pool), np.bool_), np.zeros(len(pool), np.bool_)
        order = np.argsort(pool, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(pool[order])) + 1):
            if len(rows):
                quadrant[rows], score[rows], kept[rows], topped_up[rows] = decide(
                    error[rows],
                    uncertainty[rows],
                    run.groups[rows],
                    share=self.samples,
                    normalise=self.normalise,
                    search=self.search,
                )
        plane = Plane(
            sample=run.groups,
            error=error,
            uncertainty=uncertainty,
            quadrant=quadrant,
            score=score,
            kept=kept,
            topped_up=topped_up,
            correlation=correlation(error, uncertainty),
            topped_up_share=float(topped_up.sum()) / max(int(kept.sum()), 1),
        )
        return plane, pool

    def _cut(
        self,
        worth: Float64Array,
        ids: IntArray,
        free: BoolArray,
        pool: IntArray,
        kept: BoolArray,
    ) -> BoolArray:
        """Tokens to cut so that each pool meets its budget, the worst free ones first, (N,)."""
        count = int(pool.max()) + 1
        target = np.array(
            [round(round(size * self.samples * self.tokens, 9)) for size in np.bincount(pool)],
            np.int64,
        )
        cut = np.maximum(held_by(pool, kept, count) - target, 0)
        stay = np.maximum(held_by(pool, free, count) - cut, 0)
        gone = np.zeros(len(ids), np.bool_)
        gone[free] = rules.rank_in_group(worth[free], ids[free], pool[free]) >= stay[pool[free]]
        return gone

    def _reasons(
        self, plane: Plane, owner: IntArray, keep: BoolArray, protected: BoolArray
    ) -> IntArray:
        """Index into `REASONS` for each sorted token, (N,)."""
        quadrant = plane.quadrant[owner]
        local = _HIGH if self.direction == "drop_highest" else _LOW
        in_part = np.where(keep, np.where(protected, _PROTECTED, _PART), local)
        in_kept = np.where(quadrant == CALIBRATION, _WHOLE, in_part)
        corner = (quadrant == MISCONCEPTION) | (quadrant == CALIBRATION)
        alone = np.where(quadrant == NOISY, _NOISE, _REDUNDANT)
        return np.where(plane.kept[owner], in_kept, np.where(corner, _OVER, alone))


def local_perplexity(signals: Signals, run: Grouped, mix: float) -> Float64Array:
    """Log of s_i (equation 7) of each sorted token, (N,) float64 nats; -inf where s_i is 0."""
    loss = signals["loss"][run.order].astype(np.float64)
    turn, position = signals["turn"][run.order], signals["token_position"][run.order]
    before, after = ragged.neighbours(loss, run, turn, position, outside=-np.inf)
    with np.errstate(divide="ignore"):
        own, around = np.log(1.0 - mix), np.log(mix)
    return np.asarray(np.logaddexp(own + loss, around + np.logaddexp(before, after)), np.float64)
