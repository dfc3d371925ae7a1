"""How well a score finds labels that are known to be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..pruners import rules


def noise_rows(
    scores: Mapping[str, npt.NDArray[np.floating[Any]]],
    flipped: npt.NDArray[np.bool_],
    *,
    ids: npt.NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """One row of the table `NOISE` (without its id) for each score, in the order given.

    Parameters
    ----------
    scores
        Name to (N,) float32, higher = harder.
    flipped
        (N,) bool, True = the label is wrong.
    ids
        (N,) int64, for ties among the rows looked at, which go to the smaller id; None takes
        the order of the rows.

    Returns
    -------
    list of dict
        `auc`: the chance that a wrong label scores harder than a right one, a tie counted as
        half; NaN where all labels are right or all are wrong. `found`: wrong labels among the
        `looked` hardest rows, which are as many as the `planted` ones.

    Raises
    ------
    InputError
        A score has another length than `flipped`, or holds a NaN or an infinity.
    """
    order = np.arange(len(flipped), dtype=np.int64) if ids is None else ids
    return [_row(name, score, flipped, order) for name, score in scores.items()]


def _row(
    name: str,
    score: npt.NDArray[np.floating[Any]],
    flipped: npt.NDArray[np.bool_],
    ids: npt.NDArray[np.int64],
) -> dict[str, Any]:
    if score.shape != flipped.shape or ids.shape != flipped.shape:
        raise InputError(
            f"score `{name}` and the ids must have one entry for each of the {len(flipped)} rows;"
            f" found shapes {score.shape} and {ids.shape}. Compute them over the same rows."
        )
    if not np.isfinite(score).all():
        bad = int(np.flatnonzero(~np.isfinite(score))[0])
        raise InputError(
            f"score `{name}` must be finite; row {ids[bad]} has {score[bad]}. Leave the row out,"
            " or mend the training that gave it."
        )
    planted = int(flipped.sum())
    hardest, _ = rules.top_count(score, ids, planted)
    return {
        "score": name,
        "higher_is": "harder",
        "auc": _auc(score, flipped, planted),
        "found": int((hardest & flipped).sum()),
        "planted": planted,
        "looked": int(hardest.sum()),
    }


def _auc(
    score: npt.NDArray[np.floating[Any]], flipped: npt.NDArray[np.bool_], planted: int
) -> float:
    if not 0 < planted < len(flipped):
        return math.nan
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(flipped, score))
