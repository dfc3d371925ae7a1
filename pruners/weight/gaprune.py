"""GAPrune: weights of an embedding model that a domain needs and the general task does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from .. import rules
from ..contract import Budget, FloatArray, Scope, Selection, Signals, Unit, check_fraction

_EPSILON = 1e-8
_SWAY = 0.2  # of the alignment; the factor stays within 1 - 0.2 and 1 + 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class GaPrune:
    """Keep the weights of highest domain-alignment importance (GAPrune, arXiv:2509.10844).

    score = (F_domain |w| - beta F_general |w|) clip(1 + 0.2 a, 0.8, 1.2)
            + regularisation sqrt(|w| + 1e-8);
    highest kept, over all matrices at once. F is the mean squared gradient of a contrastive loss
    on each set of texts, a the alignment of the two mean gradients at the weight.

    Departures: the published score is the softplus of this. Softplus rises everywhere, so it
    changes no order but that of weights which it makes equal in float32; it is left out. The
    published program then squeezes scores by a sigmoid of their z-scores within each matrix,
    scales again where they hardly vary, and stores signals as float16; none of that is done.

    As published the two F are not scaled. On all-MiniLM-L6-v2 they are near 1e-7, and so is the
    product of unit-length gradients, so the first term vanishes beside the second.

    Measured there (half of the MLP weights, PubMedQA against instructions, 96 pairs each): as
    published it keeps the very weights that magnitude keeps, cosine to the dense vectors of the
    domain 0.81 and MRR 0.972 (dense 0.983). With the terms balanced (options of the step
    `prune_encoder`) beta 1 is worse, 0.51 and 0.948; beta 0 is a little better, 0.86 and 0.976.

    Relations: with `regularisation` alone it is magnitude over the whole model.

    Attributes
    ----------
    keep
        Share of the weights to keep; exactly ceil(keep * N).
    beta
        How much importance to the general texts counts against a weight; at least 0.
    regularisation
        Of the square root of the magnitude, at least 0. 0.3 is the default of the published
        function, 0.5 that of its command line.
    """

    unit: ClassVar[Unit] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "weight", "domain_fisher", "general_fisher", "gradient_alignment"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    beta: float = 1.0
    regularisation: float = 0.3

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        _check_weight("beta", self.beta)
        _check_weight("regularisation", self.regularisation)

    def importance(
        self,
        weight: npt.NDArray[np.floating],
        domain_fisher: npt.NDArray[np.floating],
        general_fisher: npt.NDArray[np.floating],
        gradient_alignment: npt.NDArray[np.floating],
    ) -> FloatArray:
        """The score, float32 in the shape of the four arrays; higher = kept longer."""
        size = np.abs(weight.astype(np.float64))
        gain = (domain_fisher - self.beta * general_fisher.astype(np.float64)) * size
        factor = np.clip(1.0 + _SWAY * gradient_alignment, 1.0 - _SWAY, 1.0 + _SWAY)
        made = gain * factor + self.regularisation * np.sqrt(size + _EPSILON)
        return np.asarray(made, np.float32)

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N weights; raises InputError where a signal is missing or not finite."""
        signals.require(self.needs)
        score = self.importance(*(signals[name] for name in _ORDER))
        keep, border = rules.top_fraction(score, signals["id"], self.keep)
        return Selection(
            keep,
            score,
            (~keep).astype(np.uint8),
            ("important", "unimportant"),
            np.full(len(score), border, np.float32),
        )


_ORDER = ("weight", "domain_fisher", "general_fisher", "gradient_alignment")


def _check_weight(name: str, value: float) -> None:
    """Refuse a negative, infinite or NaN number."""
    if not 0.0 <= value < np.inf:
        raise InputError(f"`{name}` must be at least 0 and finite; found {value}.")
