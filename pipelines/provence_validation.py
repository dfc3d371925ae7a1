"""Figures of a Provence network on labelled rows, and the choice of its default threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..pruners.models.provence import Provence
from .context_metrics import Labelled, Sweep, evidence_level, flatten_ids, rank_in_passage
from .provence_batches import Special, TokenRow, batch_by_length, collate, make_example
from .provence_loss import segment_mean
from .provence_rows import TrainRow

REMOVED = 0.59  # the share of characters at which the one-threshold figure is read
MIN_SENTENCES = 3  # shorter passages leave nothing to choose
BEST = 2
Scores = tuple[float, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Validation:
    """Figures over questions; None where the rows hold nothing to measure it on.

    questions: questions with evidence in passages of three sentences or more. The next four are
    over these: evidence kept by one threshold for all at 59 % of characters removed; kept in the
    best two sentences, and the share that this removes; kept and removed at the default
    threshold. irrelevant_removed: characters removed at it from passages without evidence.
    rank_auc: chance that a passage with evidence has a higher rank logit than one without.
    """

    questions: int
    one_threshold: float | None
    best_two: float | None
    best_two_removed: float | None
    threshold: float
    kept: float | None
    removed: float | None
    irrelevant_removed: float | None
    rank_auc: float | None


def score_rows(
    model: Provence,
    rows: Sequence[TokenRow],
    special: Special,
    *,
    max_length: int,
    batch_tokens: int = 8192,
) -> list[Scores]:
    """(rank logit, sentence scores) of each row, titles shown.

    A passage beyond the window is cut at its end; sentences cut away score 0.
    """
    blind = [
        TokenRow(r.question, r.title, r.sentences, (0,) * len(r.labels), r.answer, None, 1.0)
        for r in rows
    ]
    examples = [make_example(r, special, max_length, title=True) for r in blind]
    found: list[Scores] = [(0.0, np.zeros(0))] * len(rows)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for part in batch_by_length([len(e.ids) for e in examples], batch_tokens):
            batch = collate([examples[i] for i in part], special)
            output = model(
                *(x.to(device) for x in (batch[0], batch[1], batch[2])),
            )
            count = batch.labels.shape[1]
            keep = torch.sigmoid(output.keep_logit.float()).cpu()
            score, _ = segment_mean(keep, batch.segment, count)
            rank = output.rank_logit.float().cpu()
            for j, i in enumerate(part):
                found[i] = (float(rank[j]), _spread(rows[i], score[j].numpy(), examples[i].labels))
    model.train(training)
    return found


def _spread(
    row: TokenRow, score: npt.NDArray[np.float32], labels: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Scores of the window's sentences at the places of all sentences; 0 for empty and cut ones."""
    full = np.zeros(len(row.sentences))
    present = [k for k, tokens in enumerate(row.sentences) if tokens][: len(labels)]
    full[present] = score[: len(labels)]
    return full


def choose_threshold(rows: Sequence[TrainRow], scores: Sequence[Scores], recall: float) -> float:
    """The highest threshold, in steps of 0.01, that keeps the evidence of a share of questions."""
    data, flat = _labelled(rows, scores)
    levels = evidence_level(data, flat)
    levels = levels[~np.isnan(levels)]
    if not len(levels):
        return 0.1
    cut = float(np.quantile(levels, 1.0 - recall, method="lower"))
    return float(np.clip(np.floor(cut * 100 - 1e-9) / 100, 0.01, 0.95))


def validate(rows: Sequence[TrainRow], scores: Sequence[Scores], threshold: float) -> Validation:
    """Every figure of `Validation` from stored scores."""
    chosen = [i for i, r in enumerate(rows) if r.relevant and len(r.sentences) >= MIN_SENTENCES]
    other = [i for i, r in enumerate(rows) if not r.relevant]
    figures: dict[str, float | None] = dict.fromkeys(
        ("one_threshold", "best_two", "best_two_removed", "kept", "removed")
    )
    questions = 0
    if chosen:
        data, flat = _labelled([rows[i] for i in chosen], [scores[i] for i in chosen])
        level = evidence_level(data, flat)
        questions = int((~np.isnan(level)).sum())
        figures["one_threshold"] = float(Sweep(data, flat, level).at_removed([REMOVED]).item())
        rank = rank_in_passage(data, flat)
        worst = -evidence_level(data, -rank.astype(np.float64))
        figures["best_two"] = float(np.mean(worst[~np.isnan(worst)] < BEST))
        figures["best_two_removed"] = _removed(data.chars, rank < BEST)
        figures["kept"] = float(np.mean(level[~np.isnan(level)] > threshold))
        figures["removed"] = _removed(data.chars, flat > threshold)
    irrelevant = None
    if other:
        data, flat = _labelled([rows[i] for i in other], [scores[i] for i in other])
        irrelevant = _removed(data.chars, flat > threshold)
    return Validation(
        questions=questions,
        threshold=threshold,
        irrelevant_removed=irrelevant,
        rank_auc=_auc(
            [scores[i][0] for i, r in enumerate(rows) if r.relevant], [scores[i][0] for i in other]
        ),
        **figures,
    )


def _labelled(
    rows: Sequence[TrainRow], scores: Sequence[Scores]
) -> tuple[Labelled, npt.NDArray[np.float64]]:
    sizes = [len(row.sentences) for row in rows]
    question, names = flatten_ids([row.group for row in rows])
    none = np.zeros(0, np.int64)
    data = Labelled(
        passage=np.repeat(np.arange(len(rows), dtype=np.int64), sizes),
        question=question,
        chars=np.array([b - a for row in rows for a, b in row.sentences], np.int64),
        label=np.array([x for row in rows for x in row.labels], np.int64),
        relevant=np.array([int(row.relevant) for row in rows], np.int64),
        span_question=none,
        span_first=none,
        span_last=none,
        questions=len(names),
    )
    return data, np.concatenate([score for _, score in scores])


def _removed(chars: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> float:
    return float(1.0 - chars[kept].sum() / max(1, chars.sum()))


def _auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    if not positive or not negative:
        return None
    low = np.sort(np.asarray(negative))
    high = np.asarray(positive)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / 2 / len(low))
