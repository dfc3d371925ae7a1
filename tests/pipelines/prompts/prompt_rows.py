"""A labelled set of texts in a store, for the steps of prompt search."""

import numpy as np

from prunery.pipelines.dataset_tables import DATASET
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import row_id

from ..labelled_rows import write

CLASSES = ["ant", "bee", "cat"]


def text_set(store, rows, *, classes=CLASSES, kind="text", name="data"):
    """A read_dataset table of (split, class code, text) rows."""
    made = [
        {
            "id": row_id("texts", place),
            "source": f"rows.csv#{place + 1}",
            "split": split,
            "label": label,
            "clean_label": -1,
            "group": "",
            "text": text,
            "features": [],
            "image": b"",
        }
        for place, (split, label, text) in enumerate(rows)
    ]
    notes = {"kind": kind, "classes": list(classes), "shape": []}
    options = {"made": [list(row) for row in rows], "kind": kind, "classes": list(classes)}
    return write(store, "read_dataset", DATASET, made, options=options, notes=notes, name=name)


def plain_rows(train=12, test=6, classes=3):
    """So many texts of each class and split, shuffled."""
    rows = [
        (split, label, f"{split} text {n} of class {label}")
        for split, count in (("train", train), ("test", test))
        for label in range(classes)
        for n in range(count)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[place] for place in order]


def run_step(store, step, inputs, *, name=None, seed=0, bad_rows=0.0, **options):
    """Run a step; its manifest."""
    spec = STEPS[step]
    context = StepContext(store, name=name or step, seed=seed, bad_rows=bad_rows)
    return spec(spec.options(**options), inputs, context)


def rows_of(store, table):
    """Rows of a table."""
    return store.table(table).to_table().to_pylist()
