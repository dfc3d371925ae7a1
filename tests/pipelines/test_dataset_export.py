"""An export of a data set is what the decision says, beside the rows that are held out."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prunery import cli
from prunery.errors import InputError, StoreError
from prunery.pipelines.dataset_export import (
    class_folders,
    load_dataset_export,
    write_dataset_export,
)
from prunery.pipelines.dataset_tables import DATASET_DECISION, outputs
from prunery.pipelines.engine import StepContext
from prunery.pipelines.steps import STEPS
from prunery.storage import Store

from .test_datasets import jsonl, png


def run(store, step, name, inputs=None, **options):
    spec = STEPS[step]
    return spec(spec.options(**options), inputs or {}, StepContext(store, name=name))


def decide(store, *, kept=lambda i: i % 3 == 0, left_out=1, name="decision"):
    """A decision made by hand about the training rows but the last, in reverse order."""
    rows = [row for row in store.table("data").to_table().to_pylist() if row["split"] == "train"]
    made = [
        {
            "id": row["id"],
            "keep": kept(i),
            "score": float(i),
            "reason": "best" if kept(i) else "rest",
            "threshold": None,
            "rival": None,
            "weight": (2.0 if i == 3 else 1.0) * kept(i),
        }
        for i, row in enumerate(rows[: len(rows) - left_out])
    ]
    store.commit_once(
        lambda out: out.write(pa.Table.from_pylist(made[::-1], DATASET_DECISION)),
        name=name,
        step="prune_dataset",
        inputs=[store.resolve("data")],
        options={"method": name},
        schema=DATASET_DECISION,
    )
    return rows, [row for i, row in enumerate(rows[: len(rows) - left_out]) if kept(i)]


def teach(store, classes=3, skip=0):
    ids = store.table("data").to_table(["id"])["id"].to_numpy()[skip:]
    schema = outputs(classes, 2)
    made = [{"id": i, "log_probability": [-(i % 7)] * classes, "embedding": [1, 0]} for i in ids]
    store.commit_once(
        lambda out: out.write(pa.Table.from_pylist(made, schema)),
        name="outputs",
        step="teacher_outputs",
        inputs=[store.resolve("data")],
        options={"classes": classes, "skip": skip},
        schema=schema,
    )


@pytest.fixture
def texts(tmp_path):
    store = Store(tmp_path / "store")
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(40)]
    run(store, "read_dataset", "data", path=jsonl(tmp_path / "r.jsonl", rows), holdout=0.3)
    return store


def test_rows_are_the_kept_ones_and_those_held_out(texts, tmp_path):
    rows, kept = decide(texts)
    teach(texts)
    made = write_dataset_export(
        texts, "decision", tmp_path / "out", format="rows", teacher="outputs"
    )
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "manifest.json",
        "test.parquet",
        "train.parquet",
    ]
    train = pq.read_table(made.folder / "train.parquet")
    columns = ["id", "source", "split", "label", "label_name", "text", "weight", "teacher"]
    assert train.column_names == columns
    for row, wanted in zip(train.to_pylist(), kept, strict=True):
        for name in ("id", "source", "split", "label", "text"):
            assert row[name] == wanted[name]
        assert row["label_name"] == "abc"[row["label"]]
        assert row["teacher"] == [-(row["id"] % 7)] * 3
        assert row["weight"] == (2.0 if row["id"] == rows[3]["id"] else 1.0)
    test = pq.read_table(made.folder / "test.parquet").to_pylist()
    held = [row for row in texts.table("data").to_table().to_pylist() if row["split"] == "test"]
    assert [row["id"] for row in test] == [row["id"] for row in held]
    assert {row["weight"] for row in test} == {1.0} and {row["split"] for row in test} == {"test"}
    manifest = made.manifest
    assert manifest["rows"] == len(kept) and manifest["test_rows"] == len(held)
    assert manifest["decided_rows"] == len(rows) - 1 and manifest["undecided_rows"] == 1
    assert manifest["weighted"] and manifest["teacher"] == texts.resolve("outputs")
    assert [one["step"] for one in manifest["lineage"]].count("read_dataset") == 1
    assert load_dataset_export(made.folder).rows.equals(train)


def test_ids_are_every_decision(texts, tmp_path):
    rows, _ = decide(texts)
    made = write_dataset_export(texts, "decision", tmp_path / "out", format="ids")
    found = load_dataset_export(made.folder).rows.to_pylist()
    by_id = {row["id"]: row for row in rows}
    decided = texts.table("decision").to_table().to_pylist()
    assert len(found) == len(rows) - 1
    for row, wanted in zip(found, decided, strict=True):
        assert list(row) == ["id", "source", "keep", "score", "reason"]
        assert row["source"] == by_id[row["id"]]["source"]
        assert {name: row[name] for name in ("id", "keep", "score", "reason")} == {
            name: wanted[name] for name in ("id", "keep", "score", "reason")
        }
    assert made.manifest["rows"] == sum(row["keep"] for row in decided)


def test_features_keep_their_numbers(tmp_path):
    store = Store(tmp_path / "store")
    rows = [{"features": [i, i / 2], "label": i % 2} for i in range(9)]
    run(store, "read_dataset", "data", path=jsonl(tmp_path / "r.jsonl", rows), holdout=0.0)
    decide(store, left_out=0)
    made = write_dataset_export(store, "decision", tmp_path / "out", format="rows")
    train = pq.read_table(made.folder / "train.parquet").to_pylist()
    assert [row["features"] for row in train] == [[0, 0], [3, 1.5], [6, 3]]
    assert pq.read_table(made.folder / "test.parquet").num_rows == 0
    assert made.manifest["undecided_rows"] == 0


@pytest.fixture
def images(tmp_path):
    store = Store(tmp_path / "store")
    for place, name in enumerate(["cat", "a?b", "Cat"]):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            data = png(np.full((3, 2), 20 * i + place), "JPEG" if i == 0 else "PNG")
            (tmp_path / "in" / name / f"{i}.png").write_bytes(data)
    run(store, "read_dataset", "data", path=str(tmp_path / "in"), holdout=0.3)
    return store


def test_a_folder_of_images_holds_the_stored_bytes(images, tmp_path):
    _, kept = decide(images, left_out=0)
    made = write_dataset_export(images, "decision", tmp_path / "out", format="imagefolder")
    folders = made.manifest["folders"]
    assert folders == {"Cat": "0_Cat", "a?b": "1_a_b", "cat": "2_cat"}
    samples = load_dataset_export(made.folder).rows.to_pylist()
    stored = {row["id"]: row for row in images.table("data").to_table().to_pylist()}
    assert len(samples) == made.manifest["rows"] + made.manifest["test_rows"]
    assert {row["id"] for row in samples if row["split"] == "train"} == {r["id"] for r in kept}
    for row in samples:
        data = (made.folder / row["file"]).read_bytes()
        assert data == stored[row["id"]]["image"]
        assert row["file"].startswith(f"{row['split']}/{folders[row['label_name']]}/")
        kind = Image.open(io.BytesIO(data)).format
        assert row["file"].endswith({"PNG": ".png", "JPEG": ".jpg"}[kind])
    again = Store(tmp_path / "again")
    run(again, "read_dataset", "data", path=str(made.folder))
    assert again.manifest("data").notes["split_by"] == "place"
    assert again.manifest("data").notes["rows"] == {
        "train": len(kept),
        "test": made.manifest["test_rows"],
    }


def test_names_of_classes_become_safe_folders():
    made = class_folders(["a", "..", "a/b", "b c", "é", "a\\b", ".hidden", "A"])
    assert list(made.values()) == [
        "0_a",
        "1_..",
        "2_a_b",
        "b c",
        "é",
        "5_a_b",
        "6_.hidden",
        "7_A",
    ]


def test_what_cannot_be_exported_is_said(texts, tmp_path):
    decide(texts)
    decide(texts, kept=lambda i: False, name="nothing")
    teach(texts, classes=2)
    out = tmp_path / "out"
    for ref, options, words in (
        ("decision", {"format": "trl"}, "unknown format `trl`.*rows, ids, imagefolder"),
        ("data", {"format": "rows"}, "step `read_dataset`; expected a decision"),
        ("nothing", {"format": "rows"}, "keeps no row"),
        ("decision", {"format": "imagefolder"}, "holds text, not images"),
        ("decision", {"format": "rows", "teacher": "outputs"}, "knows 2 classes"),
        ("decision", {"format": "rows", "teacher": "data"}, "column log_probability"),
        ("decision", {"format": "ids", "teacher": "outputs"}, "no column|knows 2 classes"),
        ("decision", {"format": "rows", "data": "decision"}, "expected one of `read_dataset`"),
    ):
        with pytest.raises(InputError, match=words):
            write_dataset_export(texts, ref, out, **options)
        assert not out.exists() and not list(tmp_path.glob(".out*")), "nothing half written"
    teach(texts, skip=30)
    with pytest.raises(InputError):
        write_dataset_export(texts, "decision", out, format="rows", teacher="outputs")
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    write_dataset_export(texts, "decision", out, format="ids")
    with pytest.raises(InputError, match="not empty"):
        write_dataset_export(texts, "decision", out, format="rows")
    write_dataset_export(texts, "decision", out, format="rows", force=True)
    with open(out / "train.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"train\.parquet: expected .* found"):
        load_dataset_export(out)


def test_a_decision_over_scores_is_exported_with_its_data(texts, tmp_path):
    ids = texts.table("data").to_table(["id"])["id"]
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), ("score", pa.float32())])
    texts.commit_once(
        lambda out: out.write(pa.table({"id": ids, "score": np.arange(40, dtype="f4")}, schema)),
        name="scores",
        step="import_scores",
        inputs=[texts.resolve("data")],
        schema=schema,
    )
    run(texts, "prune_scores", "kept", {"scores": "scores"}, keep=0.25)
    made = write_dataset_export(texts, "kept", tmp_path / "out", format="rows")
    train = pq.read_table(made.folder / "train.parquet").to_pylist()
    best = texts.table("data").to_table().to_pylist()[30:]
    assert [row["id"] for row in train] == [r["id"] for r in best if r["split"] == "train"]
    assert {row["weight"] for row in train} == {1.0} and not made.manifest["weighted"]
    assert made.manifest["rows"] == len(train) < 10, "held-out rows among the best are no training"


def command(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    return stop.value.code or 0


def test_the_command_line_tells_the_exporter_by_the_table(texts, tmp_path, capsys):
    _, kept = decide(texts)
    teach(texts)
    base = ["--store", tmp_path / "store", "--out", tmp_path / "out"]
    assert not command("export", "decision", "--format", "rows", "--teacher", "outputs", *base)
    said = capsys.readouterr().out
    assert f"train.parquet: {len(kept)} of " in said and "held out" in said
    assert not command("export", "decision", "--format", "ids", "--force", "--json", *base)
    assert json.loads(capsys.readouterr().out)["format"] == "ids"
    assert command("export", "decision", "--format", "rows", "--jsonl", *base) == 2
    assert "--jsonl: `decision` is about rows of a data set" in capsys.readouterr().err
    assert command("export", "data", "--format", "trl", "--teacher", "outputs", *base) == 2
    assert "fine-tuning samples" in capsys.readouterr().err
    assert command("export", "data", "--format", "trl", *base) == 2
    assert "expected one of `export_sft`" in capsys.readouterr().err
