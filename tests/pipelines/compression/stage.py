"""The compression stage on small random models: tables in a store, steps by name."""

import numpy as np

from prunery.pipelines.compression.tables import CALIBRATION
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS

from ..sft_rows import write


def run(store, step, name, inputs=None, *, seed=0, **options):
    """Manifest of a step run on tables of the store."""
    spec = STEPS[step]
    return spec(spec.options(**options), inputs or {}, StepContext(store, name=name, seed=seed))


def calibration(store, count=12, length=24, seed=0, name="rows"):
    """Key of a table of random rows for models of tests/tiny_causal.py."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = rng.integers(3, 300, length - i % 5).tolist()
        rows.append(
            {
                "id": 100 + i,
                "domain": "",
                "input_ids": ids,
                "labels": [-100, *ids[1:]],
                "sources": [i],
                "score": None,
            }
        )
    return write(store, name, "calibration_rows", CALIBRATION, [rows])
