"""Accuracy of students of pruned data, by method, fraction and distillation, beside random rows.

    python benchmarks/dataset_quality.py --data mnist --noise 0.2
    python benchmarks/dataset_quality.py --data cifar --fractions 0.1 0.3 0.5 --methods el2n ccs
    python benchmarks/dataset_quality.py --report

Data: `digits` (scikit-learn's), `mnist` and `cifar` from the development data beside the
checkout (../shared/data, not shipped). `--noise` plants that share of wrong training labels
before the teacher is trained. Every student has the same number of optimiser steps. The weight
of the teacher is chosen for each method and fraction on a held-out part of the kept rows
(`sweep_alpha`). A student's seed also draws the selection, where the method draws.

Cells that are done stand in `--out`; a run that was stopped goes on. `--report` renders all that
was measured into `results/dataset_quality.json` and a section of `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset_quality_report import write_report

from prunery.pipelines.dataset_decide import DecideOptions, Decider
from prunery.pipelines.recipe import load_recipe
from prunery.pipelines.run import run_recipe
from prunery.pipelines.students import (
    CHOSEN,
    FULL,
    RANDOM,
    Classroom,
    StudentOptions,
    classroom,
    seeds_of,
    sweep_alpha,
    train_and_score,
)
from prunery.storage import Store

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
# Each with the options that differ from the method's own.
METHODS: dict[str, dict[str, Any]] = {
    "el2n": {"method": "el2n"},
    "el2n easy": {"method": "el2n", "order": "easy"},
    "grand": {"method": "grand"},
    "forgetting": {"method": "forgetting"},
    "aum": {"method": "aum"},
    "ccs": {"method": "ccs", "cutoff": 0.1},
    "ccs, cut 30 %": {"method": "ccs", "cutoff": 0.3},
    "d2": {"method": "d2"},
    "dyn_unc": {"method": "dyn_unc"},
    "tdds": {"method": "tdds"},
    "dual": {"method": "dual"},
    "moderate": {"method": "moderate"},
    "herding": {"method": "herding"},
    "k_center": {"method": "k_center"},
    "prototypes": {"method": "prototypes"},
    "prototypes easy": {"method": "prototypes", "order": "easy"},
    "knn_shapley": {"method": "knn_shapley"},
}
# What stands beside the data in the recipe of each set, and the students' own options.
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "mlp",
        "hidden": 256,
        "holdout": 0.3,
        "epochs": 40,
        "steps": 800,
        "batch": 64,
    },
    "mnist": {
        "model": "mlp",
        "hidden": 256,
        "holdout": 0.6,
        "epochs": 30,
        "steps": 1000,
        "batch": 64,
    },
    "cifar": {
        "model": "cnn",
        "hidden": 128,
        "holdout": 0.2,
        "epochs": 15,
        "steps": 600,
        "batch": 64,
    },
}
ROLES = ("data", "dynamics", "vectors", "clusters", "neighbours", "shapley")


def source(name: str, folder: Path) -> Any:
    """What `read_dataset` is given as its path."""
    if name == "digits":
        return "builtin:digits"
    if name == "mnist":
        found = SHARED / "img_mnist"
        return [str(found / f"train-{part}-idx{n}-ubyte.gz") for part, n in
                (("images", 3), ("labels", 1))]  # fmt: skip
    made = folder / "cifar"
    if not made.exists():
        unpacked = folder / "unpacking"
        with tarfile.open(SHARED / "img_cifar10_jpeg" / "cifar10_train_2k_per_class_jpeg.tar.gz",
                          mode="r:gz") as archive:  # fmt: skip
            archive.extractall(unpacked, filter="data")
        unpacked.rename(made)
    return str(made)


def recipe_text(name: str, noise: float, folder: Path) -> str:
    """The steps up to the signals, as a recipe."""
    own = SETS[name]
    steps = {
        "data": {
            "step": "read_dataset",
            "path": source(name, folder),
            "holdout": own["holdout"],
            "flip_labels": noise,
        },
        "dynamics": {
            "step": "train_classifier",
            "inputs": {"data": "data"},
            "model": own["model"],
            "hidden": own["hidden"],
            "epochs": own["epochs"],
            "batch_size": own["batch"],
            "gradient_norm": "last_layer",
        },
        "vectors": {
            "step": "teacher_outputs",
            "inputs": {"data": "data", "model": "dynamics"},
        },
        "clusters": {"step": "cluster_rows", "inputs": {"vectors": "vectors"}},
        "neighbours": {"step": "neighbours", "inputs": {"vectors": "vectors"}, "k": 5},
        "shapley": {
            "step": "knn_shapley",
            "inputs": {"vectors": "vectors", "data": "data"},
            "validation": "self",
        },
    }
    return json.dumps({"name": f"quality_{name}", "about": "", "seed": 0, "steps": steps})


class Cells:
    """Results by cell, appended to a file one line each, so that a stopped run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {self.name(row): row for row in map(json.loads, lines)}

    @staticmethod
    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        """What tells a cell from others."""
        keys = ("data", "noise", "method", "fraction", "distilled", "seed")
        return tuple(row[key] for key in keys)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a cell."""
        self.found[self.name(row)] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def measure(room: Classroom, method: str, options: StudentOptions, line: tuple[str, float],
            given: argparse.Namespace, cells: Cells) -> None:  # fmt: skip
    """All students of one method at one fraction."""
    selection, fraction = line
    base = {"data": given.data, "noise": given.noise, "method": method, "fraction": fraction}
    wanted = [
        {**base, "distilled": distilled, "seed": seed}
        for distilled in (False, True)
        for seed in seeds_of(0, given.seeds)
    ]
    if all(Cells.name(row) in cells.found for row in wanted):
        return
    swept = sweep_alpha(
        room, options, selection, fraction, share=0.2, steps=options.steps // 2, seeds=[0]
    )
    wrong = room.rows.flipped
    for row in wanted:
        mask = room.mask(selection, fraction, row["seed"])
        alpha = swept.used if row["distilled"] else 0.0
        score = train_and_score(options, *room.part(mask), room.test, alpha=alpha, seed=row["seed"])
        cells.add(
            row
            | {
                "alpha": alpha,
                "rows": int(mask.sum()),
                "wrong": float(wrong[mask].mean()),
                "accuracy": score.accuracy,
                "worst_class": score.worst_class,
                "steps": options.steps,
                "train_rows": len(room.rows.ids),
                "test_rows": len(room.test),
            }
        )
    print(f"{given.data} {given.noise} {method} {fraction}: alpha {swept.used}", flush=True)


def rooms(given: argparse.Namespace, tables: dict[str, Any]) -> Iterator[tuple[str, Classroom]]:
    """A classroom for each method; random and full data come first."""
    inputs = {role: tables[role] for role in ROLES}
    first = DecideOptions.model_validate({"method": "el2n"})
    room = classroom(first, inputs, tables["vectors"])
    yield RANDOM, room
    for method in given.methods:
        options = DecideOptions.model_validate(METHODS[method])
        yield method, replace(room, decider=Decider.of(options, inputs, room.rows))


def run(given: argparse.Namespace) -> None:
    """Measure one set at one share of noise."""
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.data}-{given.noise}.yaml"
    path.write_text(recipe_text(given.data, given.noise, given.out))
    store = Store(given.out / "store")
    result = run_recipe(load_recipe(str(path)), store, threads=given.threads)
    tables = {name: store.table(m.key) for name, m in result.manifests.items()}
    cells = Cells(given.out / "cells.jsonl")
    own = SETS[given.data]
    options = StudentOptions(
        fractions=given.fractions,
        model=own["model"],
        hidden=own["hidden"],
        steps=own["steps"],
        batch_size=own["batch"],
    )
    for method, room in rooms(given, tables):
        lines = [(RANDOM if method == RANDOM else CHOSEN, f) for f in given.fractions]
        for line in lines:
            measure(room, method, options, line, given, cells)
        if method == RANDOM:
            measure(room, FULL, options, (FULL, 1.0), given, cells)


def main() -> None:
    """Measure, or report what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SETS, default="digits")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "dataset_quality"))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        write_report(list(Cells(given.out / "cells.jsonl").found.values()), SETS, HERE)
    else:
        import torch

        torch.set_num_threads(given.threads)
        run(given)


if __name__ == "__main__":
    main()
