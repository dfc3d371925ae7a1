"""How much a student listens to its teacher: a prior, and the choice along a measured curve.

arXiv:2403.07854 finds that the best weight of the teacher rises as fewer rows are kept, and gives
no rule. On noisy labels it also falls where the selection took the wrong labels out: there is
less left for the teacher to mend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ..errors import InputError

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Kept fraction and weight, found on one synthetic task; between them it is linear.
_PRIOR = ((0.3, 1.0), (0.7, 0.5), (1.0, 0.375))
# Below this share of wrong labels the estimate is noise of its own.
_SOME_NOISE = 0.02
_LEAST = 0.25


def doubted(margins: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Rows whose label is estimated to be wrong, (N,) bool: those of a negative mean margin.

    `margins` (N, runs * epochs), logits. Over training as a whole the network took such a row
    for another class (AUM, arXiv:2001.10528, with its threshold put at 0).
    """
    return np.asarray(margins.mean(axis=1) < 0, np.bool_)


def prior_alpha(fraction: float, kept_noise: float, noise: float) -> float:
    """The weight of the teacher to expect, 0 to 1.

    Parameters
    ----------
    fraction
        Of the rows kept.
    kept_noise, noise
        Estimated share of wrong labels among the kept rows and among all.
    """
    at, weights = zip(*_PRIOR, strict=True)
    prior = float(np.interp(fraction, at, weights))
    if noise > _SOME_NOISE and math.isfinite(kept_noise):
        prior *= min(1.0, max(_LEAST, kept_noise / noise))
    return prior


def choose_alpha(curve: Mapping[float, float], rows: int, prior: float) -> float:
    """The weight to use, by held-out accuracy: near the best, the one closest to the prior.

    Parameters
    ----------
    curve
        Weight to accuracy, 0 to 1.
    rows
        Held-out rows behind each accuracy; weights within one standard error of the best
        accuracy count as near it. Of two as close to the prior the lower is taken.
    prior
        As `prior_alpha`.

    Raises
    ------
    InputError
        The curve has no points, or `rows` is below 1.
    """
    if not curve or rows < 1:
        raise InputError(
            f"a weight is chosen along a curve measured on held-out rows; found {len(curve)}"
            f" points on {rows} rows."
        )
    best = max(curve.values())
    error = math.sqrt(max(best * (1 - best), 0.0) / rows)
    near = [alpha for alpha, accuracy in curve.items() if accuracy >= best - error]
    return nearest_alpha(near, prior)


def nearest_alpha(alphas: Iterable[float], prior: float) -> float:
    """The weight closest to the prior, of two as close the lower."""
    return min(alphas, key=lambda alpha: (abs(alpha - prior), alpha))
