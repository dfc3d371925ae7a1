"""The bundled recipe `dataset`, small: from digits with wrong labels to students and a page."""

import json

import pytest

from prunery.pipelines.explain import explain
from prunery.pipelines.recipe import Recipe, apply_overrides, load_recipe
from prunery.pipelines.run import run_recipe
from prunery.storage import Store

SMALL = (
    "teacher.epochs=3",
    "alphas.fractions=[0.2]",
    "alphas.steps=20",
    "students.fractions=[0.2]",
    "students.steps=20",
    "students.seeds=2",
)


def small(*overrides) -> Recipe:
    return apply_overrides(load_recipe("dataset"), (*SMALL, *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("dataset")
        patch.setenv("PRUNERY_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(scope="module")
def finished(folder):
    store = Store(folder / "store")
    return run_recipe(small(), store, threads=1), store


def rows(store, manifest):
    return store.table(manifest.key).to_table().to_pylist()


def test_training_rows_are_decided_and_no_class_is_lost(finished):
    result, store = finished
    data = rows(store, result.manifests["data"])
    label = {row["id"]: row["label"] for row in data if row["split"] == "train"}
    flipped = {
        row["id"] for row in data if row["split"] == "train" and row["clean_label"] != row["label"]
    }
    assert len(data) == 1797
    assert 0.08 < len(flipped) / len(label) < 0.12
    decided = rows(store, result.manifests["prune"])
    kept = [row["id"] for row in decided if row["keep"]]
    assert {row["id"] for row in decided} == set(label)
    assert len(kept) == -(-len(label) // 2)
    assert {label[id_] for id_ in kept} == set(range(10))
    assert len(flipped & set(kept)) < len(flipped) / 2


def test_every_score_is_judged_by_the_planted_noise(finished):
    result, store = finished
    found = {row["score"]: row for row in rows(store, result.manifests["noise"])}
    assert {"el2n", "grand", "forgetting", "aum", "loss", "shapley"} <= set(found)
    assert found["aum"]["auc"] > 0.9
    assert found["shapley"]["auc"] > 0.9


def test_the_grid_stands_on_the_page(finished):
    result, store = finished
    students = rows(store, result.manifests["students"])
    assert len(students) == (2 * 1 + 1) * 2 * 2
    used = [row for row in rows(store, result.manifests["alphas"]) if row["used"]]
    assert len(used) == 3
    page = result.report.read_text()
    assert all(score in page for score in ("forgetting", "shapley"))
    assert "data:image/png;base64," in page
    lines = result.lines()
    assert any("10 of 10 classes left" in line for line in lines)
    assert any(line.startswith("students: 20% chosen + distilled") for line in lines)


def test_again_and_with_workers_it_is_the_same(finished, folder):
    result, store = finished
    again = run_recipe(small(), store, threads=1)
    assert {n: m.created for n, m in again.manifests.items()} == {
        n: m.created for n, m in result.manifests.items()
    }
    fresh = run_recipe(small(), Store(folder / "other"), threads=1, workers=2)
    digests = {name: m.logical_digest for name, m in fresh.manifests.items()}
    assert digests == {name: m.logical_digest for name, m in result.manifests.items()}


def test_another_method_trains_no_teacher(finished):
    result, store = finished
    other = run_recipe(small("prune.method=el2n", "prune.keep=0.2"), store, threads=1)
    for name in ("data", "teacher", "outputs", "clusters", "neighbours", "shapley", "noise"):
        assert other.manifests[name].created == result.manifests[name].created
    assert other.manifests["prune"].kept == -(-other.manifests["prune"].rows // 5)
    grid = rows(store, other.manifests["students"])
    before = rows(store, result.manifests["students"])
    assert {r["accuracy"] for r in grid if r["selection"] == "chosen"} != {
        r["accuracy"] for r in before if r["selection"] == "chosen"
    }


def test_a_row_is_explained(finished):
    result, store = finished
    row = next(r for r in rows(store, result.manifests["prune"]) if not r["keep"])
    said = "\n".join(explain(store, result.manifests["prune"].key, row["id"]).lines())
    assert row["reason"] in said
    assert "train" in said


def test_texts_are_pruned_by_their_vectors(folder):
    path = folder / "rows.jsonl"
    lines = [
        json.dumps({"text": f"{what} number {i} in the {place}", "label": what})
        for i in range(30)
        for what, place in (("cat", "garden"), ("bond", "market"))
    ]
    path.write_text("\n".join(lines) + "\n")
    store = Store(folder / "texts")
    recipe = apply_overrides(load_recipe("dataset_text"), (*SMALL, f"data.path={path}"))
    result = run_recipe(recipe, store, threads=1)
    manifest = result.manifests["prune"]
    assert manifest.kept == -(-manifest.rows // 2)
    assert "number" in result.report.read_text()
    full = [r for r in rows(store, result.manifests["students"]) if r["selection"] == "full"]
    assert min(r["accuracy"] for r in full) > 0.9
    assert result.manifests["noise"].rows == 0
