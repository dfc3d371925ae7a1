"""Random groups, experts and layers: the controls of every structured method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_fraction,
)
from .group_selection import keep_of_parts
from .random_weights import RandomWeights

_REASONS = ("drawn", "not_drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomGroups:
    """Keep random heads and neurons of every part, each as likely as any other.

    score = a uniform number drawn from (seed, id); in a model the id says layer, half and place.

    Relations: the control of `flap`, `cfsp`, `llm_pruner` and `wanda_sp`.

    Attributes
    ----------
    keep
        Share of each part's groups to keep; exactly ceil(keep * groups).
    """

    unit: ClassVar[Unit] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "part"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction_per_group")
    scope: ClassVar[Scope] = "group"
    group: ClassVar[str | None] = "part"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, seed: int, ids: IntArray) -> FloatArray:
        """A uniform number for each id (N,) int64, (N,) float32."""
        return rules.uniform(seed, ids).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N groups; raises InputError where a signal is missing."""
        ids = signals.require(self.needs)["id"]
        return keep_of_parts(signals, self.importance(seed=seed, ids=ids), self.keep, _REASONS)


class RandomExperts(RandomGroups):
    """Keep random experts of every layer, each as likely as any other.

    score = a uniform number drawn from (seed, id).

    Relations: the control of `reap`, `easy_ep` and `expert_frequency`.
    """

    __slots__ = ()
    unit: ClassVar[Unit] = "expert"


class RandomLayers(RandomWeights):
    """Keep random layers, each as likely as any other.

    score = a uniform number drawn from (seed, id).

    Relations: the control of `block_influence`.
    """

    __slots__ = ()
    unit: ClassVar[Unit] = "layer"
