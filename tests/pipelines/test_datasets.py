"""Labelled rows of every kind of file: classes, splits, ids, and every bad row named."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunery.errors import InputError
from prunery.pipelines import builtin_datasets, datasets
from prunery.pipelines.dataset_files import raw_rows, scan_files
from prunery.pipelines.dataset_tables import DATASET
from prunery.pipelines.engine import StepContext
from prunery.pipelines.recipe import parse_recipe
from prunery.pipelines.steps import STEPS
from prunery.pruners import rules
from prunery.storage import Store

SPEC = STEPS["read_dataset"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def read(store, *, bad_rows=0.0, seed=0, **options):
    context = StepContext(store, name="data", bad_rows=bad_rows, seed=seed)
    SPEC(SPEC.options(**options), {}, context)
    table = store.table("data")
    assert table.schema.equals(DATASET)
    return table.manifest, table.to_table().to_pylist()


def png(pixels, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, format)
    return file.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(n=8):
    return [{"text": f"row {i}", "label": i % 3} for i in range(n)]


def rejected(store):
    rows = store.table("data").rejects().to_pylist()
    return [row["reason"] for row in rows]


# -- formats -------------------------------------------------------------------------------------


def write_folder(root, *, names=("cat", "dog"), size=(6, 5), count=2):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(rng.integers(0, 256, (*size, 3))))
    return root


def test_a_folder_of_images(store, tmp_path):
    root = write_folder(tmp_path / "images")
    gray = np.arange(30).reshape(6, 5)
    (root / "ant").mkdir()
    (root / "ant" / "g.jpg").write_bytes(png(gray, "JPEG"))
    (root / "ant" / "b.bmp").write_bytes(png(gray, "BMP"))
    (root / "notes.json").write_text('{"about": "no rows"}')
    manifest, rows = read(store, path=str(root), holdout=0.0)
    notes = manifest.notes
    assert notes["kind"] == "image" and notes["classes"] == ["ant", "cat", "dog"]
    assert notes["shape"] == [3, 6, 5], "colour where any image has it, height before width"
    assert notes["files_of_other_kinds"] == ["notes.json"]
    assert [(row["source"], row["label"]) for row in rows] == [
        ("ant/b.bmp", 0),
        ("ant/g.jpg", 0),
        ("cat/0.png", 1),
        ("cat/1.png", 1),
        ("dog/0.png", 2),
        ("dog/1.png", 2),
    ]
    assert rows[1]["image"] == (root / "ant/g.jpg").read_bytes(), "as it was"
    assert rows[0]["image"].startswith(b"\x89PNG") and np.array_equal(
        decoded(rows[0]["image"]), gray
    )
    assert {row["split"] for row in rows} == {"train"} and rows[0]["clean_label"] == -1


def test_folders_named_after_splits_hold_the_splits(store, tmp_path):
    write_folder(tmp_path / "set" / "train")
    write_folder(tmp_path / "set" / "val", count=1)
    manifest, rows = read(store, path=str(tmp_path / "set"))
    assert manifest.notes["split_by"] == "place" and manifest.notes["classes"] == ["cat", "dog"]
    assert Counter(row["split"] for row in rows) == {"train": 4, "test": 2}
    assert all((row["split"] == "test") == row["source"].startswith("val/") for row in rows)


def test_a_class_may_be_called_train(store, tmp_path):
    root = write_folder(tmp_path / "vehicles", names=("train", "car"))
    manifest, _ = read(store, path=str(root))
    assert manifest.notes["classes"] == ["car", "train"]
    assert manifest.notes["split_by"] == "content"


def idx(values):
    values = np.asarray(values, np.uint8)
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_pairs(store, tmp_path, zipped):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (7, 4, 3))
    labels = [5, 0, 5, 11, 2, 0, 0]
    for prefix, part in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        for kind, values in (("images-idx3", pixels[part]), ("labels-idx1", labels[part])):
            data = idx(values)
            path = tmp_path / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    manifest, rows = read(store, path=str(tmp_path), shard_bytes=24)
    assert manifest.notes["classes"] == ["0", "2", "5", "11"], "numbers in the order of numbers"
    assert manifest.notes["shape"] == [1, 4, 3] and manifest.notes["split_by"] == "place"
    assert len(manifest.parts) == 4, "two rows a shard"
    by_source = {row["source"]: row for row in rows}
    ending = "-images-idx3-ubyte" + (".gz" if zipped else "")
    for i in range(7):
        name = f"train{ending}#{i + 1}" if i < 5 else f"t10k{ending}#{i - 4}"
        row = by_source[name]
        assert np.array_equal(decoded(row["image"]), pixels[i])
        assert manifest.notes["classes"][row["label"]] == str(labels[i])
        assert row["split"] == ("train" if i < 5 else "test")


def test_idx_without_labels_or_cut_short(store, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(np.zeros((4, 2, 2)))[:-3])
    with pytest.raises(InputError, match="labels beside it as train-labels-idx1-ubyte"):
        read(store, path=str(path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx([0, 1, 2, 1]))
    with pytest.raises(InputError, match="end of the file after row 3"):
        read(store, path=str(path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx([0, 1, 2]))
    with pytest.raises(InputError, match="one label for each row"):
        read(store, path=str(path))


@pytest.mark.parametrize(
    "pixels",
    [
        np.arange(48).reshape(4, 3, 4),
        np.arange(144).reshape(4, 3, 4, 3),
        np.arange(144).reshape(4, 3, 3, 4),  # channels first
        np.arange(48).reshape(4, 3, 4, 1),
    ],
)
def test_npz_of_images(store, tmp_path, pixels):
    pixels = pixels.astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", x=pixels, y=np.array(["b", "a", "b", "c"]))
    manifest, rows = read(store, path=str(tmp_path / "a.npz"), shard_bytes=30)
    first = pixels.ndim == 4 and pixels.shape[3] not in (1, 3)
    wanted = np.moveaxis(pixels, 1, 3) if first else pixels
    for row, image in zip(rows, wanted, strict=True):
        assert np.array_equal(decoded(row["image"]), np.squeeze(image))
    assert manifest.notes["shape"] == [3 if pixels.size == 144 else 1, 3, 4]
    assert [row["label"] for row in rows] == [1, 0, 1, 2]
    assert [row["source"] for row in rows] == [f"a.npz#{i}" for i in range(1, 5)]


def test_npz_of_features_and_text_with_a_test_part(store, tmp_path):
    x = np.array([[1, 2.5], [3, -4]])
    np.savez(tmp_path / "f.npz", x_train=x, y_train=[[0], [1]], x_test=x[:1], y_test=[1])
    manifest, rows = read(store, path=str(tmp_path / "f.npz"))
    assert [row["features"] for row in rows] == [[1, 2.5], [3, -4], [1, 2.5]]
    assert [row["split"] for row in rows] == ["train", "train", "test"]
    assert manifest.notes["kind"] == "features" and manifest.notes["shape"] == [2]
    assert len({row["id"] for row in rows}) == 3
    np.savez(tmp_path / "t.npz", x=np.array(["one", "two"]), y=[True, False])
    manifest, rows = read(store, path=str(tmp_path / "t.npz"))
    assert [row["text"] for row in rows] == ["one", "two"]
    assert manifest.notes["classes"] == ["false", "true"] and manifest.notes["shape"] == []


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": [1]}, "named x and y"),
        ({"x": np.zeros((2, 2)), "y": [1]}, "one label for each row"),
        ({"x": np.zeros((2, 3, 3)), "y": [1, 2]}, "uint8 images"),
        ({"x": np.zeros((2, 4, 3, 2), np.uint8), "y": [1, 2]}, "with C 1 or 3"),
        ({"x": np.asfortranarray(np.zeros((2, 3))), "y": [1, 2]}, "Fortran"),
        ({"x": np.zeros((2, 3)), "y": np.array([1, None])}, "numbers or text"),
    ],
)
def test_npz_of_another_shape_is_refused(store, tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=words):
        read(store, path=str(tmp_path / "a.npz"))


def write_rows(path, rows):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        return jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_of_text_are_the_same_in_every_format(store, tmp_path, ending):
    rows = [
        {"text": f'say "{i}",\nthen stop', "label": name, "who": f"g{i % 2}", "part": part}
        for i, (name, part) in enumerate(
            [("b", "train"), ("a", "train"), ("b", "dev"), ("10", "train"), ("9", "test")]
        )
    ]
    path = write_rows(tmp_path / f"rows{ending}", rows)
    manifest, found = read(store, path=path, group_field="who", split_field="part", shard_bytes=40)
    assert (len(manifest.parts) > 1) == (ending != ".json")
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert manifest.notes["classes"] == ["10", "9", "a", "b"], "text, as not all are numbers"
    assert [row["label"] for row in found] == [3, 2, 3, 0, 1]
    assert [row["group"] for row in found] == [row["who"] for row in rows]
    assert [row["split"] for row in found] == ["train", "train", "test", "train", "test"]
    assert [row["source"] for row in found] == [f"rows{ending}#{i}" for i in range(1, 6)]


def test_class_names_in_a_parquet_schema_are_used(store, tmp_path):
    features = {"label": {"names": ["cat", "ant"], "_type": "ClassLabel"}}
    table = pa.table({"text": ["x", "y", "z"], "label": [0, 1, -1]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "r.parquet")
    manifest, rows = read(store, bad_rows=0.5, path=str(tmp_path / "r.parquet"))
    assert manifest.notes["classes"] == ["ant", "cat"]
    assert [row["label"] for row in rows] == [1, 0]
    assert "row 3, column label: expected a class" in rejected(store)[0]
    pq.write_table(table.replace_schema_metadata({"huggingface": "[]"}), tmp_path / "r.parquet")
    assert read(store, path=str(tmp_path / "r.parquet"))[0].notes["classes"] == ["-1", "0", "1"]


def test_pictures_that_are_not_there(store, tmp_path):
    rows = [{"label": 0, "shot": "gone.png"}, {"label": 0, "shot": 3}, {"label": 0}]
    rows.append({"label": 0, "shot": "here.png"})
    (tmp_path / "here.png").write_bytes(png([[1]]))
    path = jsonl(tmp_path / "r.jsonl", rows)
    _, found = read(store, bad_rows=0.9, path=path, image_field="shot")
    assert [row["source"] for row in found] == ["r.jsonl#4"]
    for number, (reason, words) in enumerate(
        zip(rejected(store), ("an image at 'gone.png'", "found int", "found nothing"), strict=True),
        start=1,
    ):
        assert reason.startswith(f"r.jsonl, row {number}, column shot") and words in reason


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_features_from_columns_and_lists(store, tmp_path, ending):
    rows = [{"a": i, "b": i / 2, "label": i % 2} for i in range(5)]
    path = write_rows(tmp_path / f"rows{ending}", rows)
    _, found = read(store, path=path, features=["b", "a"])
    assert [row["features"] for row in found] == [[i / 2, i] for i in range(5)]
    if ending != ".csv":
        path = write_rows(tmp_path / f"l{ending}", [{"v": [1.5, i], "label": 1} for i in range(5)])
        _, found = read(store, path=path, features="v")
        assert [row["features"] for row in found] == [[1.5, i] for i in range(5)]


def test_images_in_rows_by_bytes_by_hf_and_by_path(store, tmp_path):
    pixels = [np.full((2, 3), 40 * i, np.uint8) for i in range(3)]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(pixels[2]))
    rows = [
        {"label": 0, "image": {"bytes": png(pixels[0]), "path": "gone.png"}},
        {"label": 1, "image": {"bytes": None, "path": "pictures/a.png"}},
    ]
    path = write_rows(tmp_path / "hf.parquet", rows)
    _, found = read(store, path=path)
    assert [decoded(row["image"])[0, 0] for row in found] == [0, 80]
    path = write_rows(tmp_path / "b.parquet", [{"label": 0, "png": png(pixels[1])}])
    _, found = read(store, path=path, image_field="png")
    assert decoded(found[0]["image"])[0, 0] == 40
    [row] = read(
        store, path=jsonl(tmp_path / "o.jsonl", [{"label": 0, "image": {"path": "pictures/a.png"}}])
    )[1]
    assert decoded(row["image"])[0, 0] == 80
    path = jsonl(tmp_path / "p.jsonl", [{"label": 0, "image": "pictures/a.png"}])
    before, _ = read(store, path=path)
    (tmp_path / "pictures" / "a.png").write_bytes(png(pixels[1]))
    after, found = read(store, path=path)
    assert decoded(found[0]["image"])[0, 0] == 40, "a picture that changed is read again"
    assert before.key != after.key


# -- what is wrong ---------------------------------------------------------------------------------


def test_every_bad_row_is_named(store, tmp_path):
    good = {"features": [1, 2], "label": "a"}
    rows = [
        good,
        {"features": [1, 2]},
        {"features": [1, 2], "label": None},
        {"features": [1, 2], "label": 1.5},
        {"features": [1, 2, 3], "label": "a"},
        {"features": [1, None], "label": "a"},
        {"features": [1, "x"], "label": "a"},
        {"features": "12", "label": "a"},
        {"features": [], "label": "a"},
        {"features": [1, 1e39], "label": "a"},
        {"features": [float("nan"), 1], "label": "a"},
        {"features": [1, 2], "label": " "},
        {"features": [1, 2], "label": "only here", "part": "unknown"},
        {**good, "label": " b "},
    ]
    rows = [{"part": "train", **row} for row in rows]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2, column label: expected a class"):
        read(store, path=path, split_field="part")
    manifest, found = read(store, bad_rows=0.9, path=path, split_field="part")
    assert [row["source"] for row in found] == ["rows.jsonl#1", "rows.jsonl#14"]
    assert manifest.notes["classes"] == ["a", "b"] and manifest.notes["rows"]["train"] == 2
    columns = ["label"] * 3 + ["features"] * 4 + ["features", "features[1]", "features[0]"]
    columns += ["label", "part"]
    for number, (column, reason) in enumerate(zip(columns, rejected(store), strict=True), start=2):
        column = "features[1]" if number == 6 else column
        assert reason.startswith(f"rows.jsonl, row {number}, column {column}: expected"), reason


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "  ", "label": 1}, "text"),
        ({"text": 3, "label": 1}, "text"),
        ({"text": "\ud800", "label": 1}, "text"),
        ({"label": 1}, "text"),
        ({"text": "x", "label": ["a"]}, "label"),
        ({"text": "x", "label": 1, "g": ["a"]}, "g"),
    ],
)
def test_bad_rows_of_text(store, tmp_path, row, column):
    path = jsonl(tmp_path / "rows.jsonl", [*texts(2), row])
    with pytest.raises(InputError, match=rf"row 3, column {column}: "):
        read(store, path=path, group_field="g")


def test_csv_with_bad_bytes_and_missing_fields(store, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\n\nok,a\nfour,a,b\n\xff,a\n,a\nlast,a\n")
    _, found = read(store, bad_rows=0.9, path=str(path))
    assert [(row["text"], row["source"]) for row in found] == [
        ("ok", "rows.csv#1"),
        ("last", "rows.csv#5"),
    ]
    assert [reason.split(":")[0] for reason in rejected(store)] == [
        "rows.csv, row 2",
        "rows.csv, row 3, column text",
        "rows.csv, row 4, column text",
    ]
    path.write_text("text,text\na,b\n")
    with pytest.raises(InputError, match="every column once"):
        read(store, path=str(path))


def test_unreadable_images_are_rejected(store, tmp_path):
    root = write_folder(tmp_path / "images", size=(40, 40))
    whole = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "none.png").write_bytes(b"not an image")
    (root / "cat" / "deep.png").write_bytes(png_of_16_bits())
    (root / "top.png").write_bytes(whole)
    _, rows = read(store, bad_rows=0.9, path=str(root), holdout=0.0)
    assert len(rows) == 4
    reasons = {reason.split(":")[0]: reason for reason in rejected(store)}
    assert "whole image" in reasons["cat/cut.png"]
    assert "readable image" in reasons["cat/none.png"]
    assert "8 bits a channel" in reasons["cat/deep.png"]
    assert "expected a class" in reasons["top.png"]


def png_of_16_bits():
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(file, "PNG")
    return file.getvalue()


def test_images_of_another_size_are_rejected_or_resized(store, tmp_path):
    root = write_folder(tmp_path / "images", size=(6, 5))
    (root / "cat" / "big.png").write_bytes(png(np.full((12, 10, 3), 77)))
    manifest, rows = read(store, bad_rows=0.5, path=str(root))
    assert manifest.notes["shape"] == [3, 6, 5] and len(rows) == 4
    assert rejected(store) == [
        "cat/big.png: expected 6 x 5 pixels, as most images have; found 12 x 10. Set `image_size`"
        " to resize all."
    ]
    manifest, rows = read(store, path=str(root), image_size=[6, 5])
    assert len(rows) == 5 and manifest.notes["shape"] == [3, 6, 5]
    resized = next(row for row in rows if row["source"] == "cat/big.png")
    assert np.array_equal(decoded(resized["image"]), np.full((6, 5, 3), 77))
    same = next(row for row in rows if row["source"] == "cat/0.png")
    assert same["image"] == (root / "cat" / "0.png").read_bytes()


def test_features_of_most_rows_decide_the_length(store, tmp_path):
    rows = [{"features": [1.0] * d, "label": d} for d in (3, 2, 2)]
    manifest, found = read(store, bad_rows=0.5, path=jsonl(tmp_path / "r.jsonl", rows))
    assert manifest.notes["shape"] == [2] and len(found) == 2
    assert manifest.notes["classes"] == ["2"], "a class of rejected rows alone is none"
    assert "row 1, column features: expected 2 numbers" in rejected(store)[0]


def test_no_row_is_refused_with_the_reasons(store, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl: expected rows .* found none"):
        read(store, path=str(tmp_path / "empty.jsonl"))
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(InputError, match=r"header\.csv: expected rows .* found none"):
        read(store, path=str(tmp_path / "header.csv"))
    path = jsonl(tmp_path / "bad.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=r"no usable row(.|\n)*row 1, column label"):
        read(store, bad_rows=1.0, path=path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text")
    with pytest.raises(InputError, match=r"found no file of a labelled data set.*a\.md"):
        read(store, path=str(tmp_path / "docs"))


def test_what_is_learned_from_must_be_clear(store, tmp_path):
    rows = [{"text": "a", "features": [1], "label": 1}, {"text": "b", "features": [2], "label": 2}]
    path = jsonl(tmp_path / "both.jsonl", rows)
    with pytest.raises(InputError, match="Set `kind` to one of text, features"):
        read(store, path=path)
    assert read(store, path=path, kind="features")[0].notes["kind"] == "features"
    path = jsonl(tmp_path / "none.jsonl", [{"body": "a", "label": 1}])
    with pytest.raises(InputError, match="found body, label"):
        read(store, path=path)
    assert read(store, path=path, text_field="body")[1][0]["text"] == "a"
    root = write_folder(tmp_path / "images")
    with pytest.raises(InputError, match="rows of one kind"):
        read(store, path=[str(root), path], text_field="body")


def test_options_that_contradict_are_refused():
    for options, words in (
        ({"test_path": "a", "split_field": "s"}, "both say the split"),
        ({"image_size": [0, 2]}, "at least 1"),
        ({"path": "builtin:noisy-digits", "flip_labels": 0.1}, "flipped labels already"),
    ):
        with pytest.raises(ValueError, match=words):
            SPEC.options(**{"path": "p", **options})


# -- ids, splits, noise --------------------------------------------------------------------------


def test_copies_have_ids_of_their_own_and_one_side(store, tmp_path):
    rows = [{"text": f"text {i % 40}", "label": i % 3} for i in range(200)]
    _, found = read(store, path=jsonl(tmp_path / "r.jsonl", rows), holdout=0.3)
    assert len({row["id"] for row in found}) == 200
    sides = {(row["text"], row["split"]) for row in found}
    assert len(sides) == 40, "other labels do not part copies either"
    assert 4 <= sum(split == "test" for _, split in sides) <= 20


def test_the_share_held_out_is_met_and_zero_and_one_are_exact(store, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", texts(2000))
    _, found = read(store, path=path, holdout=0.2)
    share = sum(row["split"] == "test" for row in found) / 2000
    assert abs(share - 0.2) < 4 * (0.16 / 2000) ** 0.5
    assert {row["split"] for row in read(store, path=path, holdout=0.0)[1]} == {"train"}
    manifest, found = read(store, path=path, holdout=1.0)
    assert {row["split"] for row in found} == {"test"}
    assert "no row in the split train" in manifest.notes["remarks"]


def test_one_class_and_classes_of_the_test_split_alone_are_remarked(store, tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "p"}, {"text": "y", "label": "p"}])
    test = jsonl(tmp_path / "b.jsonl", [{"text": "z", "label": "q"}])
    manifest, _ = read(store, path=train)
    assert "one class alone: p" in manifest.notes["remarks"]
    manifest, rows = read(store, path=train, test_path=test)
    assert manifest.notes["remarks"] == ["classes in the test split alone: q"]
    assert [(row["split"], row["label"]) for row in rows] == [
        ("train", 0),
        ("train", 0),
        ("test", 1),
    ]
    assert manifest.notes["rows"] == {"train": 2, "test": 1}
    with pytest.raises(InputError, match="every file once"):
        read(store, path=train, test_path=train)
    with pytest.raises(InputError, match="two classes or more"):
        read(store, path=train, flip_labels=0.1)


def test_rows_do_not_depend_on_shards_and_files_of_one_name_stand_apart(store, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "rows.jsonl", texts(9))
    paths = [str(tmp_path / folder / "rows.jsonl") for folder in ("a", "b")]
    manifest, rows = read(store, path=paths)
    assert len({row["id"] for row in rows}) == 18
    assert rows[9]["source"] == "rows.jsonl (2)#1"
    other = Store(tmp_path / "other")
    again, same = read(other, path=paths, shard_bytes=30)
    assert len(again.parts) > len(manifest.parts)
    assert again.key == manifest.key and same == rows


def test_the_key_follows_content_and_not_place(store, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", texts())
    key = read(store, path=path)[0].key
    (tmp_path / "elsewhere").mkdir()
    moved = Path(path).rename(tmp_path / "elsewhere" / "r.jsonl")
    assert read(store, path=str(moved))[0].key == key
    assert read(store, path=str(moved), holdout=0.3)[0].key != key
    jsonl(moved, texts(9))
    assert read(store, path=str(moved))[0].key != key


def test_planted_noise_is_what_was_asked_for(store, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"text": f"t{i}", "label": i % 4} for i in range(4000)])
    _, rows = read(store, path=path, flip_labels=0.2, seed=3)
    assert all(row["clean_label"] == int(row["text"][1:]) % 4 for row in rows)
    assert all(row["label"] == row["clean_label"] for row in rows if row["split"] == "test")
    train = [row for row in rows if row["split"] == "train"]
    flipped = [row for row in train if row["label"] != row["clean_label"]]
    n = len(train)
    assert abs(len(flipped) / n - 0.2) < 4 * (0.16 / n) ** 0.5
    pairs = Counter((row["clean_label"], row["label"]) for row in flipped)
    assert len(pairs) == 12 and min(pairs.values()) > 0.5 * len(flipped) / 12
    ids = np.array([row["id"] for row in train])
    draw = rules.uniform(3, ids)
    mean = draw[[row["label"] != row["clean_label"] for row in train]].mean()
    assert abs(mean - 0.5) < 4 / (12 * len(flipped)) ** 0.5, "random pruning must not find it"
    _, again = read(store, path=path, flip_labels=0.2, seed=4)
    assert [row["label"] for row in again] != [row["label"] for row in rows]
    assert [row["id"] for row in again] == [row["id"] for row in rows]


@given(
    st.integers(2, 6),
    st.floats(0.0, 1.0),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=50, unique=True),
)
def test_flipped_labels_are_other_classes(classes, share, ids):
    ids = np.array(ids)
    label = ids % classes
    made = datasets.planted(ids, label, classes=classes, share=share, seed=1)
    assert ((made >= 0) & (made < classes)).all()
    if share == 1.0:
        assert (made != label).all()
    if share == 0.0:
        assert (made == label).all()


def test_the_builtin_digits(store):
    manifest, rows = read(store, path="builtin:digits")
    assert len(rows) == 1797 and manifest.notes["classes"] == [str(i) for i in range(10)]
    assert manifest.notes["shape"] == [1, 8, 8] and manifest.notes["kind"] == "image"
    pixels, labels = builtin_datasets.digits()
    assert pixels.max() == 255
    for i in (0, 900, 1796):
        assert rows[i]["source"] == f"builtin:digits#{i + 1}"
        assert np.array_equal(decoded(rows[i]["image"]), pixels[i])
        assert rows[i]["label"] == labels[i]
    _, noisy = read(store, path="builtin:noisy-digits", seed=5)
    assert [row["clean_label"] for row in noisy] == labels.tolist()
    train = [row for row in noisy if row["split"] == "train"]
    share = sum(row["label"] != row["clean_label"] for row in train) / len(train)
    assert 0.08 < share < 0.12
    assert [row["split"] for row in noisy] == [row["split"] for row in rows]
    _, same = read(store, path="builtin:noisy-digits", seed=6)
    assert same == noisy, "its noise is planted with seed 0, whatever the recipe's"


def test_a_plan_travels_to_other_processes(store, tmp_path):
    options = SPEC.options(path=jsonl(tmp_path / "r.jsonl", texts()))
    payload = SPEC.plan(options, {}, StepContext(store)).payload
    assert pickle.loads(pickle.dumps(payload)) == payload


def test_a_piece_is_read_alone(tmp_path):
    """Quoted line ends of CSV never part a row, wherever pieces are cut."""
    path = tmp_path / "r.csv"
    rows = [f'"a{i}\nb""{i}""\n",{i}' for i in range(20)]
    path.write_text("text,label\n" + "\n".join(rows))
    found = scan_files(str(path), {}, piece_bytes=1)
    assert len(found.pieces) == 20
    names = {"label": "label", "image": "image", "text": "text", "features": "features"}
    for piece in reversed(found.pieces):
        [(row, record)] = raw_rows(piece, None, **names, wanted=[])
        assert record == {"text": f'a{row - 1}\nb"{row - 1}"\n', "label": str(row - 1)}


def test_arrays_are_read_in_steps(store, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((5000, 3)), y=np.arange(5000) % 2)
    asked = []
    read_exactly = zipfile.ZipExtFile.read

    def watched(self, n=-1):
        asked.append(n)
        return read_exactly(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    _, rows = read(store, path=str(tmp_path / "a.npz"))
    assert len(rows) == 5000 and -1 not in asked and max(asked) <= 1 << 20
    assert 1024 * 24 in asked


def test_a_recipe_names_the_step(tmp_path):
    recipe = parse_recipe(
        "name: d\nsteps:\n  data: {step: read_dataset, path: builtin:digits, image_size: [8, 8],"
        " features: [a, b]}\n"
    )
    [step] = recipe.steps
    assert step.options.image_size == [8, 8] and step.options.path == "builtin:digits"


def test_real_files(shared_data):
    found = scan_files(str(shared_data / "img_mnist"), {})
    looked = datasets.survey(found.pieces[:1], datasets.Columns(), holdout=0.0)
    assert looked.layout.classes == tuple("0123456789") and looked.shape == [1, 28, 28]
    assert sum(len(range(p.start, p.stop)) for p in found.pieces) == 60000


def test_a_parquet_piece_with_none_of_the_columns(store, tmp_path):
    path = write_rows(tmp_path / "r.parquet", [{"a": 1}])
    with pytest.raises(InputError, match="expected columns among label, text, image, features"):
        read(store, path=path)
