"""What the page of a fine-tuning selection shows, from the tables' columns alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..pruners import rules
from ..pruners.token import plane
from . import svg
from .report import Chart, before_after, fates
from .sft_signals import Bools, Ints
from .tables import flat

Floats = npt.NDArray[np.floating[Any]]

_BINS = 25
_POINTS = 4000  # of the plane; more make the page heavy and the picture no clearer
_QUADRANTS = {4: "calibration", 2: "misconception", 1: "noise", 3: "redundant"}


def cards(decision: pa.Table, domains: Sequence[str]) -> list[dict[str, str]]:
    """Samples, tokens, domains, and how loss and entropy hang together."""
    keep = decision.column("keep").to_numpy(zero_copy_only=False)
    tokens = int(decision.column("tokens").to_numpy().sum())
    kept_tokens = int(decision.column("kept_tokens").to_numpy().sum())
    alive = {name for name, kept in zip(domains, keep.tolist(), strict=True) if kept}
    made = [
        before_after("Samples", len(keep), int(keep.sum()), "kept"),
        before_after("Trained tokens", tokens, kept_tokens, "kept"),
        {
            "label": "Domains",
            "value": f"{len(alive)} of {len(set(domains))}",
            "note": "have a sample left",
        },
    ]
    error, uncertainty = _column(decision, "error"), _column(decision, "uncertainty")
    if error is not None and uncertainty is not None and len(error) > 1:
        made.append(
            {
                "label": "Correlation",
                "value": f"{correlation(error, uncertainty):.2f}",
                "note": "of a sample's loss and entropy",
            }
        )
    topped = decision.column("topped_up").combine_chunks().drop_null()
    if len(topped) and keep.any():
        share = topped.to_numpy(zero_copy_only=False).sum() / keep.sum()
        made.append(
            {
                "label": "Topped up",
                "value": f"{share:.0%}",
                "note": "of the kept came by the supplement score, not by a quadrant",
            }
        )
    return made


def correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Pearson's r; 0 where one of them does not vary."""
    found = plane.correlation(a, b)
    return 0.0 if math.isnan(found) else found


def _column(decision: pa.Table, name: str) -> npt.NDArray[np.float64] | None:
    column = decision.column(name)
    if column.null_count:
        return None
    return np.asarray(column.to_numpy(), np.float64)


def charts(decision: pa.Table, losses: tuple[Floats, Bools] | None) -> list[Chart]:
    """The plane, the losses of samples and of tokens, and the tokens' scores.

    `losses` holds the (T,) loss and mask of all trainable tokens, or of as many as were read.
    """
    made: list[Chart] = []
    error, uncertainty = _column(decision, "error"), _column(decision, "uncertainty")
    keep = decision.column("keep").to_numpy(zero_copy_only=False)
    if error is not None and uncertainty is not None and len(error):
        made.append(_plane(decision, error, uncertainty, keep))
        made.append(_histogram("Loss of samples", "mean loss, nats", "samples", error, keep))
    if losses is not None and len(losses[0]):
        made.append(_histogram("Loss of tokens", "loss, nats", "tokens", *losses))
    unit, (_, score), mask = "tokens", flat(decision.column("token_score")), keep
    if len(score):
        mask = flat(decision.column("token_keep"))[1]
    else:
        unit, score = "samples", decision.column("score").to_numpy()
    if len(score):
        made.append(_histogram(f"Scores of {unit}", "score", unit, score, mask))
    return made


def _plane(decision: pa.Table, error: Floats, uncertainty: Floats, keep: Bools) -> Chart:
    ids = np.asarray(decision.column("id").to_numpy(), np.int64)
    shown = np.argsort(rules.uniform(0, ids))[:_POINTS]
    quadrants = decision.column("quadrant")
    if quadrants.null_count == len(ids):
        groups = [("kept", keep), ("dropped", ~keep)]
    else:
        found = quadrants.fill_null(0).to_numpy()
        groups = [(name, found == code) for code, name in _QUADRANTS.items()]
    series = [
        svg.Series(
            f"{name} ({int(mask.sum()):,})",
            [(error[i], uncertainty[i]) for i in shown if mask[i]],
            slot,
        )
        for slot, (name, mask) in enumerate(groups)
    ]
    note = "" if len(shown) == len(ids) else f" {len(shown):,} of {len(ids):,} samples are drawn."
    return Chart(
        "Error and uncertainty",
        svg.scatter(
            series,
            x_label="error: mean loss, nats",
            y_label="uncertainty: mean entropy, nats",
            label="Each sample by its mean loss and its mean entropy, coloured by quadrant",
            x_range=_range(error),
            y_range=_range(uncertainty),
            cross=(float(np.median(error)), float(np.median(uncertainty))),
        ),
        [{"cls": f"cloud s{line.slot}", "name": line.name} for line in series],
        "The lines are the medians. The farthest percent is drawn at the edge." + note,
    )


def _range(values: Floats) -> tuple[float, float]:
    low, high = (float(v) for v in np.quantile(values, [0.0, 0.99]))
    return (low, high) if high > low else (low, low + 1.0)


def _histogram(title: str, x_label: str, y_label: str, values: Floats, keep: Bools) -> Chart:
    low, high = _range(values)
    edges = np.linspace(low, high, _BINS + 1)
    clipped = np.clip(values, low, high)
    kept, _ = np.histogram(clipped[keep], edges)
    dropped, _ = np.histogram(clipped[~keep], edges)
    picture = svg.histogram(
        edges.tolist(),
        kept.tolist(),
        dropped.tolist(),
        x_label=x_label,
        y_label=y_label,
        label=f"Number of kept and dropped {y_label} by {x_label}",
    )
    note = "The farthest percent is counted in the last bar."
    return Chart(title, picture, fates(int(keep.sum()), int((~keep).sum())), note)


def domain_rows(decision: pa.Table, domains: Sequence[str]) -> list[dict[str, Any]]:
    """A line a domain, the largest first."""
    names, code = np.unique(np.array(domains, dtype=str), return_inverse=True)
    keep = decision.column("keep").to_numpy(zero_copy_only=False)
    tokens = decision.column("tokens").to_numpy()
    kept_tokens = decision.column("kept_tokens").to_numpy()
    error = _column(decision, "error")
    reasons = np.array(decision.column("reason").to_pylist(), dtype=str)
    made = []
    for number in np.argsort(-np.bincount(code), kind="stable"):
        rows = code == number
        why, counts = np.unique(reasons[rows & ~keep], return_counts=True)
        made.append(
            {
                "name": names[number] or "not named",
                "samples": f"{rows.sum():,}",
                "kept": f"{keep[rows].sum():,}",
                "tokens": f"{tokens[rows].sum():,}",
                "kept_tokens": f"{kept_tokens[rows].sum():,}",
                "loss": _mean(error, rows),
                "kept_loss": _mean(error, rows & keep),
                "reasons": ", ".join(f"{n:,} {w}" for w, n in zip(why, counts, strict=True)),
            }
        )
    return made


def _mean(values: Floats | None, rows: Bools) -> str:
    return f"{values[rows].mean():.2f}" if values is not None and rows.any() else ""


def chosen(decision: pa.Table, count: int) -> Ints:
    """Numbers of the samples to show: of every reason some, in the order of a hash of the id."""
    ids = np.asarray(decision.column("id").to_numpy(), np.int64)
    if not len(ids) or not count:
        return np.zeros(0, np.int64)
    reasons = np.unique(np.array(decision.column("reason").to_pylist(), str), return_inverse=True)
    turn = rules.rank_in_group(rules.uniform(1, ids), ids, reasons[1].astype(np.int64))
    return np.sort(np.lexsort((ids, turn))[:count]).astype(np.int64)


def example(
    pieces: Sequence[str],
    row: Mapping[str, Any],
    signals: Mapping[str, Any],
    reasons: Sequence[str],
    where: str,
) -> dict[str, Any]:
    """One sample with its tokens.

    Parameters
    ----------
    pieces
        (L,) text of each token.
    row
        Its row of the decision table.
    signals
        Its row of the signals: `token_position` (T,), and `loss` (T,) where there is one.
    reasons
        Words for the codes of `token_reason`.
    """
    shown: list[dict[str, Any]] = [{"text": text, "tag": ""} for text in pieces]
    losses = signals.get("loss") or [0.0] * len(row["token_keep"])
    for t, position in enumerate(signals["token_position"]):
        tip = f"loss {losses[t]:.2f} nats"
        if row["token_score"]:
            tip += f", {reasons[row['token_reason'][t]]}, score {row['token_score'][t]:.3g}"
        shown[position] |= {
            "tag": "span" if row["token_keep"][t] else "del",
            "heat": min(9, int(losses[t] * 1.5)),
            "tip": tip,
        }
    kept = f"{row['kept_tokens']} of {row['tokens']} tokens trained"
    return {
        "title": f"{row['reason']}: row {row['id']}",
        "note": f"{kept}, score {row['score']:.3g}",
        "where": where,
        "tokens": shown,
    }


def token_pieces(decode: Any, ids: Sequence[int]) -> list[str]:
    """(L,) text of each token; the bytes of a cut character stand with its last token.

    `decode` turns ids into text without cleaning it up.
    """
    made: list[str] = []
    before: list[int] = []  # some tokenizers write a space only after another token
    start = 0
    for stop in range(1, len(ids) + 1):
        here = list(ids[start:stop])
        text = decode(before + here)[len(decode(before)) :]
        if text.endswith("\ufffd") and stop - start < 4 and stop < len(ids):
            made.append("")
        else:
            made.append(text)
            before, start = here, stop
    return made
