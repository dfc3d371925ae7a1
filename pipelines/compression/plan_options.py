"""What a plan is told: the method, the budget, and how it is spread over the layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...errors import InputError
from ...pruners.catalogue import METHODS
from ...pruners.contract import Pruner
from ..decisions import make_pruner
from ..engine import ChoosingOptions
from .budgets import CFSP_STEEPNESS

NONE = "none"
_UNITS = ("weight", "group", "expert", "layer")
# Signals that no plan of a language model can get: their methods have steps of their own.
_ELSEWHERE = frozenset({"domain_fisher"})


class PlanningOptions(ChoosingOptions):
    """A method that compresses, its own options beside, and the budget of the whole model.

    Attributes
    ----------
    method
        Of the catalogue, with unit weight, group, expert or layer; `none` only quantises. Its
        budget (`keep`) is not set here: the plan gives each part its own.
    model
        Folder or hub id; None takes the input `model`.
    sparsity
        Share of the parameters to remove, of the parts that are planned: biases, norms,
        embeddings, routers and the skipped layers do not count.
    parts
        Halves of the blocks that take part.
    skip_first, skip_last
        Layers at either end that stay whole.
    align
        Neurons that stay are a multiple of it; None: 1 where there are fewer than 512 neurons,
        else 128, below which matrix products of a GPU waste work.
    min_keep
        Share of every part that stays at the least; one unit always does (a layer may go whole).
    tolerance
        Greatest distance of the sparsity that whole groups meet from the one asked for, where all
        layers have the same widths; else it is one group of the model.
    """

    any_method: ClassVar[bool] = False

    method: str
    model: str | None = None
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    parts: list[Literal["attention", "mlp"]] = Field(default=["attention", "mlp"], min_length=1)
    skip_first: int = Field(default=0, ge=0)
    skip_last: int = Field(default=0, ge=0)
    align: int | None = Field(default=None, ge=1)
    min_keep: float = Field(default=0.0, ge=0, le=1)
    tolerance: float = Field(default=0.02, ge=0, le=1)

    @classmethod
    def allowed(cls) -> list[str]:
        """Names of the methods that may be named here."""
        found = [
            name
            for name, method in METHODS.items()
            if method.unit in _UNITS and not method.needs & _ELSEWHERE
        ]
        return [*found, NONE] if cls.any_method else found

    @classmethod
    def options_of(cls, method: str) -> list[str] | None:
        """The method's own options, except its budget."""
        if method not in cls.allowed():
            return None
        if method == NONE:
            return []
        chosen: Any = METHODS[method]
        return [f.name for f in dataclasses.fields(chosen) if f.name != chosen.budget.field]

    @model_validator(mode="after")
    def _known(self) -> PlanningOptions:
        known = self.options_of(self.method)
        if known is None:
            raise ValueError(
                f"unknown method `{self.method}`; known here: {', '.join(self.allowed())}"
            )
        for key in self.options:
            if key not in known:
                raise ValueError(
                    f"unknown option `{key}` of `{self.method}`; known: {', '.join(known)}"
                    " (the budget is `sparsity`)"
                )
        try:
            if self.method != NONE:
                self.pruner()
        except InputError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    @property
    def unit(self) -> str:
        """What the method decides about: weight, group, expert or layer."""
        return "weight" if self.method == NONE else METHODS[self.method].unit

    @property
    def even(self) -> bool:
        """Whether all layers get the same widths."""
        return False

    def pruner(self) -> Pruner:
        """The method with its options, and its own default budget."""
        return make_pruner(self.method, self.options)


class PlanOptions(PlanningOptions):
    """Options of `plan_compression`, beside those of every plan (see `PlanningOptions`).

    Attributes
    ----------
    pattern
        "2:4": 2 of 4 consecutive inputs of a row stay; the sparsity follows from it.
    bits, group_size, quantiser
        Of quantised weights (None: not quantised); a scale for so many inputs, 0 for a row.
    allocation
        uniform: every part alike. erk: dense matrices where they are small (for weights). global:
        one threshold for all layers on the method's score. importance: by what a layer changes
        (statistics `angle` and `cosine`). search: as the input `budgets` found.
    importance
        cfsp (angles, a sigmoid) or adapt (cosines, in rounds).
    steepness, strength
        Of cfsp and of adapt.
    widths
        Of heads and neurons: uniform (all layers alike) or padded (each its own, filled up with
        zeros to the widest). None follows the allocation.
    """

    any_method: ClassVar[bool] = True

    pattern: str | None = Field(default=None, pattern=r"^[1-9][0-9]*:[1-9][0-9]*$")
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int = Field(default=128, ge=0)
    quantiser: Literal["rtn", "gptq", "rsq"] = "gptq"
    allocation: Literal["uniform", "erk", "global", "importance", "search"] = "uniform"
    importance: Literal["cfsp", "adapt"] = "cfsp"
    steepness: float = Field(default=CFSP_STEEPNESS, ge=0)
    strength: float = Field(default=0.03, ge=0)
    widths: Literal["uniform", "padded"] | None = None

    @field_validator("pattern", mode="before")
    @classmethod
    def _sexagesimal(cls, value: Any) -> Any:
        """YAML reads 2:4 without quotes as a number to the base of 60: 124 is 2:4 again."""
        if isinstance(value, int) and not isinstance(value, bool) and value > 60:
            return "{}:{}".format(*divmod(value, 60))
        return value

    @model_validator(mode="after")
    def _fits(self) -> PlanOptions:
        problem = self._pattern_problem() or self._method_problem() or self._width_problem()
        if problem:
            raise ValueError(problem)
        return self

    def _pattern_problem(self) -> str:
        if self.pattern is None:
            return ""
        n, m = self.ratio or (0, 0)
        if self.unit != "weight" or self.method == NONE:
            return f"`pattern` is for methods that prune weights; `{self.method}` does not"
        if not n < m:
            return f"`pattern` keeps n of m inputs, n < m; found {self.pattern}"
        if self.allocation != "uniform":
            return "a `pattern` fixes the sparsity of every matrix: allocation is uniform"
        if "sparsity" in self.model_fields_set and abs(self.sparsity - (1 - n / m)) > 1e-9:
            return f"`pattern` {self.pattern} is a sparsity of {1 - n / m:g}; leave `sparsity` out"
        return ""

    def _method_problem(self) -> str:
        if self.method == NONE:
            if self.bits is None:
                return "`method: none` only quantises: give `bits`"
            if "sparsity" in self.model_fields_set and self.sparsity:
                return "`method: none` removes nothing: leave `sparsity` out"
            return "" if self.allocation == "uniform" else "`method: none`: allocation is uniform"
        if self.bits is not None and self.unit != "weight":
            return (
                f"`{self.method}` removes whole groups: quantise its model in a second plan, with"
                " `method: none` and its compressed table as input `model`"
            )
        if self.allocation == "erk" and self.unit != "weight":
            return f"allocation erk is for methods that prune weights; `{self.method}` does not"
        return ""

    def _width_problem(self) -> str:
        skips = self.skip_first + self.skip_last > 0
        if self.unit == "expert" and (self.allocation != "uniform" or skips):
            return (
                "every layer must keep as many experts, as the configuration has one number:"
                " allocation is uniform, and no layer is skipped"
            )
        if self.unit == "layer" and self.allocation not in ("uniform", "global"):
            return f"layers stay or go by the method's score; allocation {self.allocation} has none"
        uneven = self.allocation != "uniform" or skips
        if self.unit == "group" and self.widths == "uniform" and uneven:
            return (
                "`widths: uniform` needs allocation uniform and no skipped layers; else choose"
                " `widths: padded`"
            )
        return ""

    @property
    def ratio(self) -> tuple[int, int] | None:
        """n and m of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def share_removed(self) -> float:
        """The sparsity asked for, of the parts that are planned."""
        if self.ratio is not None:
            return 1 - self.ratio[0] / self.ratio[1]
        return 0.0 if self.method == NONE else self.sparsity

    @property
    def even(self) -> bool:
        """Whether all layers get the same widths."""
        plain = self.allocation == "uniform" and not (self.skip_first or self.skip_last)
        return self.widths != "padded" and plain

    def identity(self) -> dict[str, Any]:
        """What enters the key and tells later steps how to carry the plan out."""
        made = self.model_dump(exclude={"model"})
        return made | {"widths": "uniform" if self.even else "padded", "unit": self.unit}
