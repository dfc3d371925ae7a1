"""Step `prompt_task`: what it writes, counts, puts into its key, and refuses."""

import pytest

from prunery.errors import InputError, RecipeError
from prunery.pipelines.prompts.tables import TASK
from prunery.pipelines.prompts.task import classes_of, task_of
from prunery.storage import Store, row_id

from .prompt_rows import CLASSES, plain_rows, rows_of, run_step, text_set

INPUTS = {"data": "data"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def task(store, **options):
    given = {"shots": 2, "validation_shots": 3, "test_rows": 10}
    return run_step(store, "prompt_task", INPUTS, name="task", **{**given, **options})


def test_the_table_holds_the_parts_and_the_task(store):
    rows = plain_rows()
    text_set(store, rows)
    manifest = task(store, verbalisers={"bee": "honey bee"})
    table = store.table("task")
    made = rows_of(store, "task")
    assert table.to_table().schema.equals(TASK)
    assert classes_of(table) == CLASSES and manifest.notes["data"] == "data"
    read_back = task_of(table)
    assert read_back.shots == 2 and read_back.verbalisers == {"bee": "honey bee"}
    assert read_back.template == "{text}"
    source = {row_id("texts", place): row for place, row in enumerate(rows)}
    for row in made:
        split, label, text = source[row["id"]]
        assert (row["text"], row["label"]) == (text, label)
        assert (split == "test") == (row["part"] == "test")
    assert [row["part"] for row in made] == ["train"] * 6 + ["validation"] * 9 + ["test"] * 10
    assert [row["label"] for row in made[:6]] == [0, 1, 2] * 2
    assert [row["shot"] for row in made[:6]] == [0, 0, 0, 1, 1, 1]
    assert manifest.kept == 25 and manifest.dropped == {"not_drawn": 54 - 25}


def test_what_changes_rows_changes_the_key(store):
    text_set(store, plain_rows())
    keys = [task(store).key, task(store, shots=3).key, task(store, seed=1).key]
    keys.append(task(store, manual="Hello").key)
    assert len(set(keys)) == 4
    assert task(store).key == keys[0]
    assert store.table(keys[0]).manifest.models["model"]


def test_the_same_seed_gives_the_same_rows(store):
    text_set(store, plain_rows())
    first = task(store).logical_digest
    assert task(store, manual="x").logical_digest == first  # another key, drawn alike
    assert task(store, seed=1).logical_digest != first


def test_blank_texts_are_bad_rows(store):
    rows = [*plain_rows(), ("train", 0, " \u3000\n")]
    text_set(store, rows)
    with pytest.raises(InputError, match=r"rows.csv#55, text: expected text, found white space"):
        task(store)
    manifest = task(store, bad_rows=0.1)
    assert manifest.rejected == 1 and manifest.kept == 25


def test_refusals(store):
    text_set(store, plain_rows(), kind="features")
    with pytest.raises(InputError, match="expected labelled texts, found features"):
        task(store)
    text_set(store, plain_rows(classes=1), classes=["ant"])
    with pytest.raises(InputError, match="at least 2 classes, found ant"):
        task(store)
    text_set(store, plain_rows())
    with pytest.raises(RecipeError, match="names the class 'dog'"):
        task(store, verbalisers={"dog": "x"})
    with pytest.raises(RecipeError, match="stands for the classes 'ant' and 'cat'"):
        task(store, verbalisers={"ant": "pet", "cat": "pet"})
    with pytest.raises(InputError, match=r"class 'ant': expected 16 .* found 12 rows"):
        task(store, shots=16)
    text_set(store, plain_rows(), classes=[*CLASSES, "dog"])
    with pytest.raises(InputError, match="class 'dog': .*found 0 rows"):
        task(store)


def test_a_task_for_an_endpoint_needs_no_model_here(store):
    text_set(store, plain_rows())
    manifest = task(store, black_box="endpoint", model="some", base_url="http://127.0.0.1:9/v1")
    assert manifest.models == {}
