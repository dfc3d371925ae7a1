"""Figures of the model card: the shipped model (or another) on QED's development part.

    python benchmarks/default_figures.py --data ../shared/data

Questions with a selected sentence whose passages have three sentences or more; the same passages
dealt to other questions (a fixed permutation) are the ones without evidence. `quality.py` sets
the model beside the other methods; this gives one model's thresholds in a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import quality_data as sets

from prunery.pipelines.provence_batches import Special, tokenise_rows
from prunery.pipelines.provence_rows import TrainRow
from prunery.pipelines.provence_validation import MIN_SENTENCES, Scores, score_rows, validate
from prunery.pruners.models.provence import load_provence

THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def held_out(data: Path, seed: int = 0) -> list[TrainRow]:
    """Passages with their own questions, then the same passages with another's."""
    rows = [
        TrainRow(
            question=r.question,
            passage=r.passage,
            title=r.title,
            sentences=r.sentences,
            labels=r.labels or (),
            group=str(i),
        )
        for i, r in enumerate(sets.qed(data))
        if r.labels and 1 in r.labels and len(r.sentences) >= MIN_SENTENCES
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    order = np.where(order == np.arange(len(rows)), (order + 1) % len(rows), order)
    dealt = [
        replace(rows[j], question=row.question, group=row.group, labels=(0,) * len(rows[j].labels))
        for row, j in zip(rows, order.tolist(), strict=True)
    ]
    return rows + dealt


def edges(rows: Sequence[TrainRow], scores: Sequence[Scores], threshold: float) -> dict[str, float]:
    """Share of evidence sentences kept at the first, the inner and the last place."""
    kept: dict[str, list[bool]] = {"first": [], "inner": [], "last": []}
    for row, (_, score) in zip(rows, scores, strict=True):
        for k, label in enumerate(row.labels):
            if label == 1:
                last = k == len(row.labels) - 1
                place = "first" if k == 0 else "last" if last else "inner"
                kept[place].append(bool(score[k] > threshold))
    return {place: round(float(np.mean(x)), 3) for place, x in kept.items() if x}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="default")
    given = parser.parse_args()
    model = load_provence(given.model, device="cpu")
    rows = held_out(given.data)
    scores = score_rows(
        model.model,
        tokenise_rows(model.tokenizer, rows),
        Special.of(model.tokenizer),
        max_length=model.config.max_length,
    )
    found = validate(rows, scores, model.config.threshold)
    levels = {}
    for threshold in THRESHOLDS:
        at = validate(rows, scores, threshold)
        levels[str(threshold)] = {
            "kept": round(at.kept or 0.0, 3),
            "removed": round(at.removed or 0.0, 3),
            "irrelevant_removed": round(at.irrelevant_removed or 0.0, 4),
        }
    own = len(rows) // 2
    print(
        json.dumps(
            {
                "digest": model.digest,
                "at the default threshold": asdict(found),
                "thresholds": levels,
                "evidence kept by place": edges(rows[:own], scores[:own], found.threshold),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
