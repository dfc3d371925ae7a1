"""What the compression benchmarks share: data and models in a store, and steps run by name.

Needs the shared data (TinyStories and the checkpoint stories260K); see each benchmark.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunery.pipelines.compression.model_tables import model_folder
from prunery.pipelines.compression.quality import Rows, RowScores, compare, load_packed
from prunery.pipelines.engine import StepContext
from prunery.pipelines.models import without_bars
from prunery.pipelines.steps import STEPS
from prunery.storage import Manifest, Store

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"


def run(
    store: Store, step: str, name: str, inputs: dict[str, str], seed: int = 0, **options: Any
) -> Manifest:
    """A step on tables of the store; what exists is not made again."""
    spec = STEPS[step]
    return spec(spec.options(**options), inputs, StepContext(store, name=name, seed=seed))


def stories_model(work: Path) -> Path:
    """Folder of stories260K as transformers loads it."""
    path = HERE.parent / "tests" / "pruners" / "signals" / "stories260k.py"
    spec = importlib.util.spec_from_file_location("stories260k", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = work / "stories260K"
    if not (folder / "model.safetensors").is_file():
        source = SHARED / "ckpt_stories260K"
        model = module.load_stories(source / "stories260K.bin")
        model.save_pretrained(folder)
        module.fast_tokenizer(source / "tok512.bin", model.config.vocab_size).save_pretrained(
            folder
        )
    return folder


def stories() -> list[str]:
    """TinyStories, each as one text."""
    found = next((SHARED / "lm_tinystories").glob("*.gz"))
    with gzip.open(found, "rt", encoding="utf-8") as file:
        text = file.read()
    return [part.strip() for part in text.split("<|endoftext|>") if len(part.strip()) > 100]


def lines_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines, for `read_chats`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(store: Store, key: str) -> Rows:
    """A `calibration_rows` table as rows to judge on; every token but the first is a target."""
    found = store.table(key).to_table().to_pylist()
    tokens = [np.array(row["input_ids"], np.int64) for row in found]
    targets = [np.ones(len(row), np.bool_) for row in tokens]
    return Rows(np.array([row["id"] for row in found], np.int64), tokens, targets)


def judged(store: Store, dense: Any, key: str, rows: Rows) -> RowScores:
    """How the model of a table does on the rows."""
    with torch.no_grad(), without_bars():
        other = load_packed(model_folder(store.table(key)))
        return compare(dense, other, rows, batch_tokens=4096)[1]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval by Student's t."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread
