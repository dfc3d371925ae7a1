"""What the token methods have in common, above all a share of every sample's tokens."""

from __future__ import annotations

import numpy as np

from .. import rules
from ..contract import BoolArray, FloatArray, IntArray, Selection, Signals


def protected_tokens(signals: Signals, wanted: bool) -> BoolArray:
    """(N,) bool: tokens that may not be dropped; none where not wanted or not told."""
    if wanted and "protected" in signals:
        return np.asarray(signals["protected"], np.bool_)
    return np.zeros(signals.n, np.bool_)


def excess(signals: Signals) -> FloatArray:
    """loss - reference_loss, (N,) float32 nats: high where another model finds it easier."""
    return np.asarray(signals["loss"] - signals["reference_loss"], np.float32)


def keep_share(
    signals: Signals,
    score: FloatArray,
    fraction: float,
    reasons: tuple[str, str],
    *,
    keep_protected: bool,
) -> Selection:
    """Keep exactly ceil(fraction * tokens) of every sample: the highest scores, ties to the
    earlier token.

    Protected tokens come first and count towards that number; where they are more than it,
    they are kept and nothing else is. A fraction of 0 keeps nothing. `score` (N,) float32 is
    stored as it is compared; `reasons` name a kept and a dropped token.
    """
    protected = protected_tokens(signals, keep_protected)
    _, owner, sizes = np.unique(signals["sample"], return_inverse=True, return_counts=True)
    quota = rules.counts_of(sizes, fraction)
    held = held_by(owner, protected, len(sizes))
    quota = np.where(quota > 0, np.maximum(quota, held), 0)
    rank = rules.rank_in_group(score, signals["id"], owner, first=protected)
    keep = np.asarray(rank < quota[owner], np.bool_)
    return explained(keep, score, protected, reasons)


def keep_share_of_table(
    signals: Signals,
    score: FloatArray,
    fraction: float,
    reasons: tuple[str, str],
    *,
    keep_protected: bool,
) -> Selection:
    """Keep ceil(fraction * N) tokens of the table: the highest scores, ties to the smaller id.

    A protected token stands right behind its sample's best other token, so that it is kept
    with it and counts towards the number. Where the border falls in between, the protected
    tokens of the sample are kept on top of the number.
    """
    n = signals.n
    protected = protected_tokens(signals, keep_protected)
    samples, owner = np.unique(signals["sample"], return_inverse=True)
    rank_by = score
    if protected.any():
        rank_by = score.copy()
        best = np.full(len(samples), -np.inf, np.float32)
        np.maximum.at(best, owner[~protected], score[~protected])
        # A sample of nothing but protected tokens is ranked by their own scores.
        follows = protected & np.isfinite(best)[owner]
        rank_by[follows] = best[owner[follows]]
    order = np.lexsort((signals["id"], protected, -rank_by))
    keep = np.zeros(n, np.bool_)
    keep[order[: rules.count_of(n, fraction)]] = True
    keep |= protected & (held_by(owner, keep, len(samples)) > 0)[owner]
    return explained(keep, score, protected, reasons)


def held_by(owner: IntArray, flag: BoolArray, samples: int) -> IntArray:
    """Number of flagged tokens of each sample, (S,) int64."""
    return np.bincount(owner[flag], minlength=samples)


def explained(
    keep: BoolArray, score: FloatArray, protected: BoolArray, reasons: tuple[str, str]
) -> Selection:
    """A selection whose reasons are the two given and `protected`."""
    reason = np.where(keep, np.where(protected, 1, 0), 2).astype(np.uint8)
    return Selection(keep, score, reason, (reasons[0], "protected", reasons[1]))
