"""How a score of weights becomes a selection: over a whole matrix, or within its rows."""

from __future__ import annotations

import numpy as np

from .. import rules
from ..contract import FloatArray, Selection, Signals

REASONS = ("important", "unimportant")


def keep_of_matrix(
    signals: Signals, score: FloatArray, keep: float, reasons: tuple[str, str] = REASONS
) -> Selection:
    """Keep exactly ceil(keep * N) weights: the highest scores (N,), ties to the smaller id."""
    mask, border = rules.top_fraction(score, signals["id"], keep)
    held = np.full(len(mask), border, np.float32)
    return Selection(mask, score, (~mask).astype(np.uint8), reasons, held)


def keep_of_rows(signals: Signals, score: FloatArray, keep: float) -> Selection:
    """Keep exactly ceil(keep * in) weights of every row of the matrix (signal `output`)."""
    mask = rules.top_fraction_by_group(score, signals["id"], signals["output"], keep)
    return Selection(mask, score, (~mask).astype(np.uint8), REASONS)
