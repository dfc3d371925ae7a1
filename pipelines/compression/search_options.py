"""What a search for budgets is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...errors import InputError
from .evolution import Schedule
from .plan_options import PlanningOptions


class SearchBudgetsOptions(PlanningOptions):
    """Options of `search_budgets`, beside those of every plan (see `PlanningOptions`).

    The whole dense model is in memory while it is searched.

    Attributes
    ----------
    start
        Where the search begins: every part alike, or erk (for weights). Parts of a kind trade
        units with one another alone, so this also says how much each kind keeps in all.
    level
        Share of a part's units that one level of the first round is; later rounds halve it.
    rounds, generations, offspring, swaps, survivors, evaluations
        See `evolution.Schedule`. `evaluations` is a hard limit on forward looks at a genome.
    tokens
        That each stage looks at, of the rows in their order; as many stages as `survivors`.
    top
        Next tokens of the dense model that are told apart.
    compensate
        refit: matrices after removed heads or neurons are solved anew for each level. For single
        weights: those that stay make up for those that went.
    tokens_a_batch
        Padded tokens in a batch at most.
    device, dtype
        Where, and in what numbers the model runs.
    """

    start: Literal["uniform", "erk"] = "uniform"
    level: float = Field(default=0.125, gt=0, lt=1)
    rounds: int = Field(default=3, ge=1)
    generations: int = Field(default=10, ge=1)
    offspring: int = Field(default=16, ge=1)
    swaps: int = Field(default=4, ge=1)
    survivors: list[int] = Field(default=[6, 3, 2], min_length=1)
    tokens: list[int] = Field(default=[512, 2048, 8192], min_length=1)
    evaluations: int | None = Field(default=None, ge=1)
    top: int = Field(default=64, ge=1)
    compensate: Literal["none", "refit"] = "none"
    tokens_a_batch: int = Field(default=2048, ge=1)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _searchable(self) -> SearchBudgetsOptions:
        if self.unit not in ("weight", "group"):
            raise ValueError(
                f"`{self.method}` removes whole {self.unit}s, of which layers have no shares to"
                " trade: search for a method over weights or groups"
            )
        if self.start == "erk" and self.unit != "weight":
            raise ValueError(f"start erk is for methods over weights; `{self.method}` is not one")
        if len(self.tokens) != len(self.survivors) or self.tokens != sorted(self.tokens):
            raise ValueError(
                "`tokens` rise from stage to stage, one number for each of `survivors`; found"
                f" {self.tokens} and {self.survivors}"
            )
        try:
            self.schedule()
        except InputError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def schedule(self) -> Schedule:
        """How long is searched."""
        return Schedule(
            rounds=self.rounds,
            generations=self.generations,
            offspring=self.offspring,
            swaps=self.swaps,
            survivors=tuple(self.survivors),
            evaluations=self.evaluations,
        )
