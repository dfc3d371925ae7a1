"""Layer drop by block influence: layers that hardly turn the hidden state go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rules
from ..contract import Budget, FloatArray, Scope, Selection, Signals, Unit, check_fraction
from .group_selection import REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfluence:
    """Keep the layers that change the hidden state most (ShortGPT, arXiv:2403.03853).

    score = 1 - mean over tokens of the cosine between a layer's input and output (equation 1).
    All layers are scored on the dense model, at once.

    Departures: the count is exact, ceil(keep * layers), ties to the smaller id.

    Relations: CFSP and Adapt-Pruner spread a budget by the same measure; `random_layers` is the
    control.

    Attributes
    ----------
    keep
        Share of the layers to keep.
    """

    unit: ClassVar[Unit] = "layer"
    needs: ClassVar[frozenset[str]] = frozenset({"id", "block_cosine"})
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.75

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)

    def importance(self, *, cosine: FloatArray) -> FloatArray:
        """Block influence of each layer (N,) float32, from its mean cosine."""
        return (1.0 - cosine.astype(np.float64)).astype(np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N layers; raises InputError where a signal is missing or not legal."""
        cosine = signals.require(self.needs)["block_cosine"]
        score = self.importance(cosine=cosine)
        keep, border = rules.top_fraction(score, signals["id"], self.keep)
        held = np.full(signals.n, border, np.float32)
        return Selection(keep, score, (~keep).astype(np.uint8), REASONS, held)
