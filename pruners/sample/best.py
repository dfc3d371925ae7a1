"""The rule that most sample methods share: a fraction of the table by score."""

from __future__ import annotations

import numpy as np

from .. import rules
from ..contract import FloatArray, Selection, Signals


def keep_best(
    signals: Signals, score: FloatArray, fraction: float, reasons: tuple[str, str]
) -> Selection:
    """Keep exactly ceil(fraction * N) rows: the highest scores, ties to the smaller id.

    `score` (N,) float32 is stored as it is compared; `reasons` name a kept and a dropped row.
    """
    keep, border = rules.top_fraction(score, signals["id"], fraction)
    threshold = np.full(signals.n, border, np.float32)
    return Selection(keep, score, (~keep).astype(np.uint8), reasons, threshold)
