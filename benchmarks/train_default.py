"""Train the model that is shipped: build the rows, two stages of training, copy the result.

    python benchmarks/train_default.py --data ../shared/data --work build/default --install

Stage 1: questions made from statements by rule (`cloze.py`). Stage 2: labelled questions
(`default_rows.py`), from the weights of stage 1. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloze import cloze_rows
from default_rows import (
    Labelled,
    Neighbours,
    load,
    negative_rows,
    training_rows,
)

from prunery.pipelines.provence_rows import write_rows
from prunery.pipelines.train_provence import TrainProvenceOptions, train_provence

HOME = Path(__file__).resolve().parent.parent / "pruners" / "models" / "default"
LICENCE = "CC-BY-SA-4.0"
SEED = 0
_LOG = logging.getLogger("train_default")


def prepare(data: Path, work: Path) -> None:
    """Write cloze.jsonl.gz, train.jsonl.gz and valid.jsonl.gz."""
    corpus = load(data)
    near = Neighbours(corpus.pool)
    counts: dict[str, Any] = dict(sorted(corpus.counts.items()))
    counts["pool"] = len(corpus.pool)
    counts["cloze rows"] = write_rows(
        work / "cloze.jsonl.gz", cloze_rows(near, SEED, negatives=0.3, limit=7000)
    )
    counts["training rows"] = write_rows(
        work / "train.jsonl.gz", training_rows(corpus.train, near, SEED)
    )
    counts["validation rows"] = write_rows(work / "valid.jsonl.gz", valid_rows(corpus.valid, near))
    (work / "rows.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    _LOG.info("rows: %s", counts)


def valid_rows(items: list[Labelled], near: Neighbours) -> list[Any]:
    """Validation passages, each question also with one near and one random passage of another."""
    rows = []
    for item, hard in zip(items, near.hard(items, 1), strict=True):
        rows.append(item.row(1.0))
        rows += negative_rows(item, hard, near.pool, 1.0, SEED)[:2]
    return rows


def options(work: Path, stage: int, **changed: Any) -> TrainProvenceOptions:
    """Options of a stage; what is not named here keeps its default."""
    common: dict[str, Any] = {
        "valid_rows": work / "valid.jsonl.gz",
        "lora_rank": 40,
        "licence": LICENCE,
        "seed": SEED,
    }
    if stage == 1:
        common |= {"rows": work / "cloze.jsonl.gz", "output": work / "stage1", "epochs": 1.0}
    else:
        common |= {
            "rows": work / "train.jsonl.gz",
            "output": work / "stage2",
            "init_from": work / "stage1",
            "epochs": 2.0,
            # As published checkpoints have it; what it keeps and removes is in the model card.
            "threshold": 0.1,
        }
    return TrainProvenceOptions(**(common | changed))


def install(folder: Path) -> None:
    """Copy weights and config to where `load_provence("default")` looks."""
    for name in ("model.safetensors", "provence.json"):
        shutil.copyfile(folder / name, HOME / name)


def main() -> None:
    """Rows, stage 1, stage 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("build/default"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "rows.json").is_file():
        prepare(given.data, given.work)
    for stage in (1, 2):
        chosen = options(given.work, stage, threads=given.threads)
        if not (chosen.output / "model.safetensors").is_file():
            print(json.dumps(asdict(train_provence(chosen)), indent=2), flush=True)
    if given.install:
        install(given.work / "stage2")


if __name__ == "__main__":
    main()
