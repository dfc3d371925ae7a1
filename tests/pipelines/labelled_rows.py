"""A labelled data set of features in a store, with the tables that a teacher leaves."""

import numpy as np
import pyarrow as pa

from prunery.pipelines.dataset_tables import DATASET, DYNAMICS, neighbours, outputs
from prunery.storage import row_id

CLASSES = ["ant", "bee", "cat"]
EPOCHS = 4


def write(store, step, schema, rows, *, inputs=(), options=None, notes=None, name=None):
    """A table of those rows, in one shard."""
    writing = store.write(
        name=name or step, step=step, version=1, options=options or {}, inputs=list(inputs),
        models={}, seed=0, schema=schema,
    )  # fmt: skip
    with writing as writer:
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(rows, schema))
                out.count(kept=len(rows), dropped={})
        return writer.commit(notes=notes or {}).key


def labelled(store, *, train=60, test=30, flip=(), seed=0, group=lambda row: "", classes=CLASSES):
    """Rows of three classes around three centres; the training rows of `flip` are mislabelled."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(train + test):
        code = row % len(classes)
        wrong = row in flip
        features = rng.normal(0, 0.3, 4) + 2.0 * np.eye(4)[code]
        rows.append(
            {
                "id": row_id("labelled", row),
                "source": f"rows.csv#{row + 1}",
                "split": "train" if row < train else "test",
                "label": (code + 1) % len(classes) if wrong else code,
                "clean_label": code if flip and row < train else -1,
                "group": group(row),
                "text": "",
                "features": features.astype(np.float32).tolist(),
                "image": b"",
            }
        )
    notes = {"kind": "features", "classes": list(classes), "shape": None}
    options = {"made": [train, test, list(flip), seed, len(classes)]}
    return write(store, "read_dataset", DATASET, rows, options=options, notes=notes), rows


def dynamics(store, data, rows, *, runs=1, gradient=False):
    """Trajectories in which a flipped row is wrong until the last epoch."""
    made = []
    for run in range(runs):
        for epoch in range(EPOCHS):
            for place, row in enumerate(row for row in rows if row["split"] == "train"):
                wrong = row["clean_label"] not in (-1, row["label"])
                learned = epoch == EPOCHS - 1 or not wrong
                margin = (1.0 + place / 100 + epoch) * (1 if learned else -1)
                p = 1 / (1 + np.exp(-margin))
                made.append(
                    {
                        "id": row_id("dynamics", row["id"], run, epoch),
                        "sample": row["id"],
                        "run": run,
                        "epoch": epoch,
                        "true_probability": p,
                        "margin": margin,
                        "correct": bool(learned),
                        "loss": -np.log(p),
                        "el2n": (1 - p) * np.sqrt(2),
                        "probability_change": None if epoch == 0 else 0.1,
                        "gradient_norm": (1 - p) if gradient else None,
                        "logits": [],
                    }
                )
    options = {
        "epochs": EPOCHS,
        "runs": runs,
        "gradient_norm": "last_layer" if gradient else None,
    }
    return write(store, "train_classifier", DYNAMICS, made, inputs=[data], options=options)


def teacher(store, data, rows):
    """A teacher that knows the clean labels, and unit vectors of the features."""
    made = []
    for row in rows:
        truth = row["clean_label"] if row["clean_label"] >= 0 else row["label"]
        p = np.full(len(CLASSES), 0.05)
        p[truth] = 0.9
        vector = np.array(row["features"])
        made.append(
            {
                "id": row["id"],
                "log_probability": np.log(p).tolist(),
                "embedding": (vector / np.linalg.norm(vector)).tolist(),
            }
        )
    return write(store, "teacher_outputs", outputs(len(CLASSES), 4), made, inputs=[data])


def ring(store, data, rows):
    """The two next rows of each training row as its neighbours."""
    ids = [row["id"] for row in rows if row["split"] == "train"]
    made = [
        {
            "id": id_,
            "neighbour": [ids[(place + step) % len(ids)] for step in (1, 2)],
            "neighbour_distance": [0.5, 0.7],
        }
        for place, id_ in enumerate(ids)
    ]
    return write(store, "neighbours", neighbours(2), made, inputs=[data])
