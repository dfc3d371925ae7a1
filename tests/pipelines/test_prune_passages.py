"""Passages decided one after another: duplicates, then prototypes of what is left."""

import numpy as np
import pyarrow as pa
import pytest

from prunery.errors import InputError
from prunery.pipelines.engine import StepContext
from prunery.pipelines.recipe import load_recipe
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from .labelled_rows import write

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), 8), nullable=False),
    ]
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def vectors(store):
    """Forty texts around four directions; texts 0 and 1 say the same."""
    rng = np.random.default_rng(0)
    made = 3.0 * np.eye(8)[np.arange(40) % 4] + rng.normal(0, 0.5, (40, 8))
    made[1] = made[0]
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    rows = [{"id": 100 + i, "embedding": row.tolist()} for i, row in enumerate(made)]
    return write(store, "embed", SCHEMA, rows)


def run(store, step, inputs, **options):
    spec = STEPS[step]
    context = StepContext(store=store, name=step, seed=0, threads=1)
    return spec(spec.options.model_validate(options), inputs, context)


def rows(store, manifest):
    return {row["id"]: row for row in store.table(manifest.key).to_table().to_pylist()}


def test_what_went_as_a_duplicate_takes_no_part_in_what_follows(store):
    keys = {"vectors": vectors(store)}
    clusters = run(store, "cluster_rows", keys, clusters=4)
    distinct = run(
        store,
        "prune_passages",
        {**keys, "clusters": clusters.key},
        method="semdedup",
        distance=1e-4,
    )
    assert distinct.kept == 39
    gone = next(id_ for id_, row in rows(store, distinct).items() if not row["keep"])
    assert gone in (100, 101)
    again = run(store, "cluster_rows", {**keys, "decision": distinct.key}, clusters=4)
    assert set(rows(store, again)) == set(range(100, 140)) - {gone}
    diverse = run(
        store,
        "prune_passages",
        {**keys, "clusters": again.key, "after": distinct.key},
        method="prototypes",
        keep=0.5,
    )
    found = rows(store, diverse)
    assert len(found) == 40
    assert diverse.kept == 20
    assert diverse.dropped["dropped_before"] == 1
    assert found[gone]["reason"] == "dropped_before"
    assert found[gone]["rival"] is None
    distance = {id_: row["centroid_distance"] for id_, row in rows(store, again).items()}
    kept = [distance[id_] for id_, row in found.items() if row["keep"]]
    dropped = [distance[id_] for id_, row in found.items() if not row["keep"] and id_ != gone]
    assert min(kept) >= max(dropped)


def test_a_method_over_clusters_asks_for_them(store):
    with pytest.raises(InputError, match="input `clusters`, made by cluster_rows"):
        run(store, "prune_passages", {"vectors": vectors(store)}, method="prototypes")


def test_the_recipe_clusters_again_what_is_left():
    steps = {step.name: step for step in load_recipe("d4").steps}
    assert steps["again"].inputs["decision"] == "distinct"
    assert steps["diverse"].inputs == {
        "vectors": "vectors",
        "clusters": "again",
        "after": "distinct",
    }
