"""Tables of a small pruned data set, written by hand into a store."""

import io

import numpy as np
import pyarrow as pa

from prunery.pipelines.dataset_tables import (
    ALPHAS,
    DATASET,
    DATASET_DECISION,
    DYNAMICS,
    NOISE,
    STUDENTS,
    outputs,
)
from prunery.storage import row_id

CLASSES = ["cat", "<dog>", "eel"]
# Eight training rows and two test rows. The second is a cat that was labelled a dog.
LABEL = [0, 1, 1, 0, 2, 0, 1, 1, 0, 1]
CLEAN = [0, 0, 1, 0, 2, 0, 1, 1, 0, 1]
SPLIT = ["train"] * 8 + ["test"] * 2
KEEP = [True, False, True, True, False, True, False, False]
SCORE = [0.9, 0.1, 0.5, 0.8, 0.2, 0.6, 0.4, 0.3]
REASON = ["top" if keep else "below_border" for keep in KEEP]
IDS = [100 + number for number in range(10)]


def write(store, name, step, schema, rows, *, inputs=(), notes=None, options=None):
    """A committed table of one shard."""
    with store.write(
        name=name,
        step=step,
        version=1,
        options=options or {},
        inputs=list(inputs),
        models={},
        seed=0,
        schema=schema,
    ) as writer:
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(rows, schema))
        writer.commit(notes=notes or {})
    store.point(name, writer.key)
    return writer.key


def png(value, size=(8, 8), mode="L"):
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, size, value).save(out, "PNG")
    return out.getvalue()


def data_rows(*, kind="image", groups=False, clean=CLEAN):
    return [
        {
            "id": IDS[i],
            "source": f"rows#{i + 1}",
            "split": SPLIT[i],
            "label": LABEL[i],
            "clean_label": clean[i],
            "group": "ab"[i % 2] if groups else "",
            "text": f"<script>{i}</script>" if kind == "text" else "",
            "features": [float(i), *np.arange(1.0, 10.0)] if kind == "features" else [],
            "image": png(20 * i) if kind == "image" else b"",
        }
        for i in range(10)
    ]


def decision_rows():
    return [
        {
            "id": IDS[i],
            "keep": KEEP[i],
            "score": SCORE[i],
            "reason": REASON[i],
            "threshold": 0.5,
            "rival": IDS[2] if i == 6 else None,
            "weight": float(KEEP[i]) * (2.0 if i == 3 else 1.0),
        }
        for i in range(8)
    ]


def data(store, **options):
    """Key of the data."""
    kind = options.get("kind", "image")
    notes = {"kind": kind, "classes": CLASSES, "shape": [1, 8, 8]}
    return write(
        store, "data", "read_dataset", DATASET, data_rows(**options), notes=notes, options=options
    )


def decision(store, data_key, rows=None):
    """Key of the decision."""
    made = {
        "method": "best",
        "options": {"keep": 0.5},
        "difficulty": "aum",
        "by": None,
        "balance": ["class", 0.5, None],
    }
    rows = decision_rows() if rows is None else rows
    return write(
        store, "prune", "prune_dataset", DATASET_DECISION, rows, inputs=[data_key], options=made
    )


def dynamics_rows(probability):
    """Rows of `DYNAMICS` of (runs, epochs, N) probabilities of the labels."""
    return [
        {
            "id": (run * 100 + epoch) * 1000 + i,
            "sample": IDS[i],
            "run": run,
            "epoch": epoch,
            "true_probability": float(p),
            "margin": 0.0,
            "correct": True,
            "loss": 0.0,
            "el2n": 0.0,
            "probability_change": None,
            "gradient_norm": None,
            "logits": [],
        }
        for run, epochs in enumerate(probability)
        for epoch, values in enumerate(epochs)
        for i, p in enumerate(values)
    ]


def dynamics(store, data_key, probability):
    rows = dynamics_rows(probability)
    return write(store, "dynamics", "train_classifier", DYNAMICS, rows, inputs=[data_key])


def student(fraction, selection, distilled, seed, accuracy, **more):
    row = {
        "id": row_id("student", repr((fraction, selection, distilled, seed))),
        "fraction": fraction,
        "selection": selection,
        "distilled": distilled,
        "seed": seed,
        "alpha": 0.5 if distilled else 0.0,
        "temperature": 2.0,
        "rows": round(8 * fraction),
        "steps": 50,
        "accuracy": accuracy,
        "worst_class_accuracy": accuracy - 0.2,
    }
    return row | more


def grid_rows(fractions=(0.25, 0.5), seeds=3):
    """Distilled above labels alone by 5 points, chosen above random by 10 with few rows only."""
    rows = []
    for seed in range(seeds):
        for fraction in fractions:
            base = 0.6 + 0.3 * fraction + 0.01 * seed
            for chosen in (False, True):
                for distilled in (False, True):
                    accuracy = base + 0.05 * distilled + 0.10 * chosen * (fraction < 0.5)
                    # A small difference of either sign, which no one should take for a finding.
                    accuracy += 0.004 * chosen * (seed - 1) + 0.001 * distilled * seed
                    name = "chosen" if chosen else "random"
                    rows.append(student(fraction, name, distilled, seed, accuracy))
        rows.append(student(1.0, "full", False, seed, 0.9 + 0.01 * seed))
    return rows


def students(store, decision_key, rows=None):
    rows = grid_rows() if rows is None else rows
    return write(store, "students", "distil", STUDENTS, rows, inputs=[decision_key])


def alpha_rows(fractions=(0.25, 0.5), selections=("random", "chosen")):
    return [
        {
            "id": row_id("alpha", repr((fraction, selection, alpha))),
            "fraction": fraction,
            "selection": selection,
            "alpha": alpha,
            "accuracy": 0.8 + 0.1 * alpha * (1 - fraction),
            "seed": 0,
            "used": alpha == 1.0,
        }
        for fraction in fractions
        for selection in selections
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]


def alphas(store, decision_key, rows=None):
    rows = alpha_rows() if rows is None else rows
    return write(store, "alphas", "sweep_alpha", ALPHAS, rows, inputs=[decision_key])


def noise(store, data_key, rows):
    rows = [{"id": number, **row} for number, row in enumerate(rows)]
    return write(store, "noise", "noise_found", NOISE, rows, inputs=[data_key])


def teacher(store, data_key):
    """The teacher says `eel` of every row, with probability 0.8."""
    said = np.log([0.1, 0.1, 0.8]).tolist()
    rows = [{"id": id_, "log_probability": said, "embedding": [1.0, 0.0]} for id_ in IDS]
    return write(store, "outputs", "teacher_outputs", outputs(3, 2), rows, inputs=[data_key])
