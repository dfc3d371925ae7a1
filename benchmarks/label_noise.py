"""Wrong labels found by training dynamics, by KNN-Shapley, and by cleanlab's scores.

    pip install cleanlab
    python benchmarks/label_noise.py

A share of the labels of scikit-learn's digits, or of MNIST's (development data beside the
checkout), is flipped to another class; the network never sees the right ones. Ours come from one
training of the network, its trajectories taken after each epoch. cleanlab's are computed from
probabilities that a user has: of the same trained network for the rows it was trained on, and out
of sample from five trainings on four fifths each, which is what cleanlab asks for. AUC: the
chance that a wrong label scores worse than a right one. Found: wrong labels among as many rows as
were flipped. Several seeds draw the flips and the network's start.

Writes `results/label_noise.json` and a section of `RESULTS.md` beside this file.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import numpy.typing as npt
import torch
from sections import write_section

from prunery.pipelines.classifier import Examples, ModelSpec, Trainer, make_model, predict
from prunery.pipelines.dynamics import last_layer_norms, measures
from prunery.pipelines.noise_figures import noise_rows
from prunery.pipelines.student_figures import figure
from prunery.pruners.contract import Signals
from prunery.pruners.sample.difficulty import difficulty_of
from prunery.pruners.signals.shapley import knn_shapley

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
EPOCHS, BATCH, RATE, NEIGHBOURS, FOLDS = 30, 64, 0.05, 10, 5
OURS = {"el2n": "el2n", "grand": "gradient_norm", "forgetting": "correct", "aum": "margin",
        "loss": "loss_trajectory"}  # fmt: skip
Score = npt.NDArray[np.float32]


def rows(name: str, most: int) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Images (N, 1, H, W) uint8 and labels (N,) int64, `most` rows at most."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        pixels = np.round(x * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    else:
        folder = SHARED / "img_mnist"
        pixels = np.frombuffer(
            gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
        ).reshape(-1, 1, 28, 28)
        y = np.frombuffer(
            gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
        )
    return torch.from_numpy(pixels[:most].copy()), y[:most].astype(np.int64)


def flipped(label: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
    """Labels of which exactly a share is another class, drawn uniformly."""
    rng = np.random.default_rng((seed, 7))
    made, classes = label.copy(), int(label.max()) + 1
    at = rng.choice(len(label), round(share * len(label)), replace=False)
    made[at] = (made[at] + rng.integers(1, classes, len(at))) % classes
    return made


def train(
    x: torch.Tensor, label: npt.NDArray[np.int64], seed: int, after: Callable[[Any], None] | None
) -> Any:
    """A network trained on the rows; `after` is called with it after every epoch."""
    n = len(label)
    examples = Examples(
        np.arange(n), x, label, np.full(n, -1), np.full(n, "train"), int(label.max()) + 1, "image"
    )
    a_pass = math.ceil(n / BATCH)
    model = make_model(ModelSpec("mlp"), examples.shape, examples.classes, seed)
    trainer = Trainer(
        model, examples, steps=EPOCHS * a_pass, batch_size=BATCH, learning_rate=RATE, seed=seed
    )
    for epoch in range(EPOCHS):
        trainer.run((epoch + 1) * a_pass)
        if after is not None:
            after(trainer.model)
    return trainer.model


def softmax(logits: Score) -> npt.NDArray[np.float64]:
    """(N, C) probabilities."""
    return torch.softmax(torch.from_numpy(logits).double(), 1).numpy()


def ours(x: torch.Tensor, label: npt.NDArray[np.int64], seed: int) -> tuple[dict[str, Score], Any]:
    """Scores (higher = harder) from one training, and its network."""
    found: dict[str, list[Any]] = {name: [] for name in OURS.values()}

    def after(model: Any) -> None:
        logits, features = predict(model, x)
        made = measures(logits, label)
        for name in ("el2n", "correct", "margin"):
            found[name].append(made[name])
        found["loss_trajectory"].append(made["loss"])
        found["gradient_norm"].append(last_layer_norms(logits, features, label))

    model = train(x, label, seed, after)
    arrays = {name: np.stack(values, 1) for name, values in found.items()}
    signals = Signals({"id": np.arange(len(label)), **arrays})
    return {name: difficulty_of(name, signals) for name in OURS}, model


def shapley(x: torch.Tensor, label: npt.NDArray[np.int64], model: Any) -> Score:
    """Minus the KNN-Shapley value, each row judged by the others in the features."""
    import faiss

    features = predict(model, x)[1]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)
    near = index.search(features, 10 * NEIGHBOURS + 1)[1]
    at = np.arange(len(label))[:, None]
    itself = near == at
    itself[~itself.any(axis=1), -1] = True
    others = near[~itself].reshape(len(label), -1)
    n = len(label)
    agree = label[others] == label[:, None]
    value = knn_shapley(others, agree, NEIGHBOURS, n, candidates=n - 1)
    return -value.astype(np.float32)


def out_of_sample(x: torch.Tensor, label: npt.NDArray[np.int64], seed: int) -> Any:
    """(N, C) probabilities of each row by a network that did not see it."""
    fold = np.random.default_rng((seed, 9)).permutation(len(label)) % FOLDS
    made = np.zeros((len(label), int(label.max()) + 1))
    for number in range(FOLDS):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        model = train(x[torch.from_numpy(inside)], label[inside], seed, None)
        made[outside] = softmax(predict(model, x[torch.from_numpy(outside)])[0])
    return made


def measure(name: str, share: float, seed: int, most: int) -> list[dict[str, Any]]:
    """All scores on one draw of flips."""
    from cleanlab.rank import get_label_quality_scores

    x, clean = rows(name, most)
    label = flipped(clean, share, seed)
    start = time.perf_counter()
    scores, model = ours(x, label, seed)
    seconds = dict.fromkeys(scores, time.perf_counter() - start)
    start = time.perf_counter()
    scores["knn_shapley"] = shapley(x, label, model)
    seconds["knn_shapley"] = seconds["aum"] + time.perf_counter() - start
    given = {"in sample": softmax(predict(model, x)[0])}
    took = {"in sample": seconds["aum"]}
    start = time.perf_counter()
    given["5 folds"] = out_of_sample(x, label, seed)
    took["5 folds"] = time.perf_counter() - start
    for where, probability in given.items():
        for method in ("self_confidence", "normalized_margin"):
            quality = get_label_quality_scores(label, probability, method=method)
            scores[f"cleanlab {method}, {where}"] = -quality.astype(np.float32)
            seconds[f"cleanlab {method}, {where}"] = took[where]
    made = noise_rows(scores, label != clean)
    return [
        {**row, "data": name, "share": share, "seed": seed, "rows": len(label),
         "seconds": seconds[row["score"]]}
        for row in made
    ]  # fmt: skip


def text(values: list[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and half of the 95 % t-interval."""
    found = figure(scale * value for value in values)
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"


def report(found: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Results file and section."""
    made = {
        "command": fresh.command(__file__),
        "machine": fresh.machine("cpu", given.threads) | {"load_before": given.load},
        "seed": f"0 to {given.seeds - 1}",
        "rows": found,
    }
    fresh.save(HERE, "label_noise", made)
    where = made["machine"]
    lines = [
        "## Wrong labels found",
        "",
        f"`{made['command']}`",
        "",
        f"{where['processor']}, {given.threads} threads, Python {where['python']}, torch"
        f" {torch.__version__}, cleanlab {version('cleanlab')}. Load average at the start"
        f" {given.load:.1f}. {given.seeds} seeds; ± is half a 95 % t-interval over them. A"
        f" multilayer perceptron, {EPOCHS} epochs; seconds are of all the trainings that a score"
        " needs.",
        "",
        "| data | flipped | score | AUC | found of flipped | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, share in sorted({(row["data"], row["share"]) for row in found}):
        mine = [row for row in found if (row["data"], row["share"]) == (name, share)]
        for score in dict.fromkeys(row["score"] for row in mine):
            own = [row for row in mine if row["score"] == score]
            lines.append(
                f"| {name} ({own[0]['rows']:,}) | {share:.0%} | {score}"
                f" | {text([row['auc'] for row in own])}"
                f" | {text([row['found'] / row['planted'] for row in own], 100, 1)} %"
                f" | {np.mean([row['seconds'] for row in own]):.1f} |"
            )
    write_section(HERE / "RESULTS.md", "label-noise", "\n".join(lines))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist"), default=["digits"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.load = os.getloadavg()[0]
    found = []
    for name in given.data:
        for share in given.shares:
            for seed in range(given.seeds):
                found += measure(name, share, seed, given.rows)
                print(name, share, seed, flush=True)
    report(found, given)


if __name__ == "__main__":
    main()
