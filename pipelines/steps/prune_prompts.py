"""Step `prune_prompts`: which words stay in the search space. Nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from ...errors import BudgetError
from ...pruners import rules
from ...pruners.contract import Selection, Signals
from ...storage import Table
from ..decisions import SCHEMA, MethodOptions, decision_table, spread
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..prompts.tables import REWARDS

PROMPT_DECISION = pa.schema([*SCHEMA, pa.field("text", pa.string(), nullable=False)])

# Why a word was not decided about: halving stopped asking about it.
ELIMINATED = "eliminated_early"


class PrunePromptsOptions(MethodOptions):
    """Options of `prune_prompts`: a method of the unit `prompt` with its options, and these.

    Attributes
    ----------
    reward
        The column of prompt_influence that `prompt_influence` of a method is read from.
    count
        Words to keep, in place of the method's `keep`.
    rule
        `top` keeps exactly ceil(keep * words), stable on ties. `percentile` is the published
        rule, for comparison: strictly above numpy's percentile, so that ties may leave nothing.
    """

    method: str = "claps"
    reward: str = "log_likelihood"
    count: int | None = Field(default=None, ge=0)
    rule: Literal["top", "percentile"] = "top"

    @classmethod
    def units(cls) -> frozenset[str]:
        """Words of a prompt."""
        return frozenset({"prompt"})

    @classmethod
    def override(cls, given: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
        """As for any method; of `count` and `keep` the one set last stands."""
        other = {"count": "keep", "keep": "count"}.get(key)
        return super().override({k: v for k, v in given.items() if k != other}, key, value)

    @model_validator(mode="after")
    def _agree(self) -> PrunePromptsOptions:
        if self.reward not in REWARDS:
            raise ValueError(f"`reward` is one of {', '.join(REWARDS)}")
        if self.count is not None and "keep" in self.options:
            raise ValueError("`count` and `keep` both say how many words stay: give one of them")
        if self.rule == "percentile" and (self.method != "claps" or self.count is not None):
            raise ValueError(
                "`rule: percentile` is the published rule of `claps`, and takes `keep`"
            )
        return self

    def kept_of(self, words: int) -> int:
        """How many of so many words stay."""
        if self.count is not None:
            return min(self.count, words)
        return rules.count_of(words, self.share())

    def share(self) -> float:
        """The share of the words that the method's own budget keeps."""
        pruner = self.pruner()
        return float(getattr(pruner, pruner.budget.field))


def plan(options: PrunePromptsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard: the rule looks at all words."""
    return Plan(PROMPT_DECISION, 1, options.model_dump())


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about every word; raises BudgetError where halving left too few."""
    options: PrunePromptsOptions = job.options  # type: ignore[assignment]
    table = job.input("influence").to_table(["id", "text", "finalist", options.reward])
    table = table.filter(pa.compute.not_equal(table.column("text"), ""))
    ids = table.column("id").to_numpy().astype(np.int64)
    influence = table.column(options.reward).to_numpy().astype(np.float32)
    finalist = np.asarray(table.column("finalist").to_numpy(zero_copy_only=False), np.bool_)
    made = prune_words(options, ids, influence, finalist, seed=job.seed)
    rows = decision_table(ids, made)
    out.write(pa.Table.from_arrays([*rows.columns, table.column("text")], schema=PROMPT_DECISION))
    out.count(made.kept, made.dropped())


def prune_words(
    options: PrunePromptsOptions,
    ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    influence: np.ndarray[tuple[int], np.dtype[np.float32]],
    finalist: np.ndarray[tuple[int], np.dtype[np.bool_]],
    *,
    seed: int,
) -> Selection:
    """Decide about V words with their influence (V,), of which finalists (V,) alone can stay.

    The budget is a share of all V words, so that halving and a full pass keep equally many.

    Raises
    ------
    BudgetError
        Fewer finalists than words to keep.
    """
    pruner = options.pruner()
    judged = "prompt_influence" in pruner.needs  # a random control draws from all words
    at = np.flatnonzero(finalist) if judged else np.arange(len(ids))
    wanted = options.kept_of(len(ids))
    if wanted > len(at):
        raise BudgetError(
            f"{wanted} of {len(ids)} words are to stay, and halving asked {len(at)} of them on all"
            " rows. Raise `least` of prompt_influence, or keep fewer."
        )
    signals = Signals({"id": ids[at], "prompt_influence": influence[at]})
    share = wanted / len(at) if len(at) else 0.0
    made = type(pruner)(**{**options.options, pruner.budget.field: share})(signals, seed=seed)
    if options.rule == "percentile":
        made = _published(options, made, influence[at])
    if len(at) == len(ids):
        return made
    return Selection(
        keep=spread(len(ids), at, made.keep, False),
        score=spread(len(ids), at, made.score, 0.0),
        reason=spread(len(ids), at, made.reason, len(made.reasons)),
        reasons=(*made.reasons, ELIMINATED),
        threshold=spread(len(ids), at, made.threshold, np.nan),
    )


def _published(
    options: PrunePromptsOptions,
    made: Selection,
    influence: np.ndarray[tuple[int], np.dtype[np.float32]],
) -> Selection:
    from ...pruners.prompt.published import published_rule

    q = round(100.0 * (1.0 - options.share()), 9)
    keep = published_rule(influence, q)
    border = np.percentile(influence, q) if len(influence) else np.nan
    return Selection(
        keep=keep,
        score=made.score,
        reason=(~keep).astype(np.uint8),
        reasons=made.reasons,
        threshold=np.full(len(keep), border, np.float32),
    )


SPEC = StepSpec(
    name="prune_prompts",
    version=1,
    options=PrunePromptsOptions,
    inputs={"influence": Slot(("prompt_influence",))},
    plan=plan,
    shard=shard,
    about="Which words stay in the prompt search space.",
)
