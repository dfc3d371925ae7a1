"""The rows of a labelled data set that a decision kept, written as files to train on.

rows          train.parquet, the kept training rows, and test.parquet, the rows held out as they
              are: id, source, split, label (code), label_name, what is learned from (text,
              features or image), weight
ids           ids.parquet: id, source, keep, score, reason of every row decided about
imagefolder   train/CLASS/ID.png (or .jpg) and test/CLASS/…, with samples.parquet beside them:
              the columns of `rows`, and `file` in place of the image

Where a teacher's outputs are given, rows and samples have a column `teacher`, the log
probability of each class in nats. The weight is what a row's loss is multiplied by in training;
trainers that read no such column train with 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from ..storage import Store, Table
from .dataset_tables import TEST, TRAIN
from .exports import Exported, ancestor, check_target, new_folder, read_manifest, write_manifest
from .tables import among

DatasetFormat = Literal["rows", "ids", "imagefolder"]
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)
STEPS = ("prune_dataset", "prune_scores")
"""Steps whose decisions are about rows of a data set."""

_FILES: dict[str, str] = {"rows": "train.parquet", "ids": "ids.parquet"}
_SIDE = "samples.parquet"
_NEVER_DECIDED = "not decided"


@dataclass(frozen=True)
class _Source:
    """The tables that an export reads."""

    decision: Table
    data: Table
    teacher: Table | None
    kept: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    decided: npt.NDArray[np.int64]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def kind(self) -> str:
        """image, text or features."""
        return str(self.data.manifest.notes["kind"])

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.data.manifest.notes["classes"])


def write_dataset_export(
    store: Store,
    ref: str,
    folder: str | Path,
    *,
    format: DatasetFormat,
    data: str | None = None,
    teacher: str | None = None,
    force: bool = False,
) -> Exported:
    """Write what a decision about a data set kept.

    The files are made in a folder beside `folder` and moved there when all are whole. Memory is
    21 bytes a row decided about, and a batch of rows.

    Parameters
    ----------
    store, ref
        Where the decision is (a table of `prune_dataset`, or of `prune_scores` over a data set's
        scores), and its name or key.
    folder
        Must not exist or be empty, unless `force` replaces it.
    format
        See the module.
    data
        Table of `read_dataset` with the rows; found among the decision's ancestors where not
        given.
    teacher
        Table of `teacher_outputs` about the same rows.

    Raises
    ------
    InputError
        An unknown format, another kind of table, a decision that keeps nothing, images asked of
        rows without, a teacher of other rows or classes, or a folder that is not empty.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format `{format}` of a data set; known: {', '.join(FORMATS)}.")
    check_target(Path(folder), force)
    source = _source(store, ref, data, teacher)
    if format == "imagefolder" and source.kind != "image":
        raise InputError(
            f"`{source.data.manifest.name}` holds {source.kind}, not images. Use the format rows."
        )
    if format == "ids" and source.teacher is not None:
        raise InputError("ids have no column for a teacher. Leave it out, or use the format rows.")
    target = Path(folder)
    with new_folder(target, force) as made:
        if format == "ids":
            _write_ids(source, made)
        elif format == "rows":
            _write_rows(source, made)
        else:
            _write_images(source, made)
        more = {
            "data": _FILES.get(format, "."),
            "rows": source.counts["kept"],
            "test_rows": source.counts[TEST],
            "decided_rows": len(source.decided),
            "undecided_rows": source.counts[_NEVER_DECIDED],
            "kind": source.kind,
            "classes": source.classes,
            "shape": source.data.manifest.notes.get("shape"),
            "teacher": source.teacher.key if source.teacher else None,
            "weighted": bool((source.weight != 1).any()),
        }
        if format == "imagefolder":
            more["folders"] = class_folders(source.classes)
        manifest = write_manifest(store, source.decision.manifest, made, format, more)
    return Exported(target, manifest)


def load_dataset_export(folder: str | Path) -> Exported:
    """Read an export back after hashing every file again.

    Its `rows` are the kept rows of `rows`, the lines of `ids`, or the samples of `imagefolder`.

    Raises
    ------
    StoreError
        No export is there, or a file is missing, damaged or not listed.
    """
    home = Path(folder)
    manifest = read_manifest(home, FORMATS)
    return Exported(home, manifest, pq.read_table(home / _FILES.get(manifest["format"], _SIDE)))


def _source(store: Store, ref: str, data: str | None, teacher: str | None) -> _Source:
    decision = store.table(ref)
    if decision.manifest.step not in STEPS:
        raise InputError(
            f"`{ref}` is a table of step `{decision.manifest.step}`; expected a decision of"
            f" {' or '.join(STEPS)}."
        )
    table = store.table(data) if data else _data_of(store, decision)
    if table.manifest.step != "read_dataset":
        raise InputError(
            f"`{table.manifest.name}` is a table of step `{table.manifest.step}`; expected one of"
            " `read_dataset`."
        )
    outputs = store.table(teacher) if teacher else None
    if outputs is not None:
        _check_teacher(outputs, len(table.manifest.notes["classes"]))
    weighted = "weight" in decision.schema.names
    columns = ["id", "keep"] + ["weight"] * weighted
    ids, keep, weight = [], [], []
    for batch in decision.batches(columns):
        ids.append(batch.column("id").to_numpy())
        keep.append(batch.column("keep").to_numpy(zero_copy_only=False))
        weight.append(batch.column("weight").to_numpy() if weighted else keep[-1])
    decided = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    mask = np.concatenate(keep) if keep else np.zeros(0, np.bool_)
    if not mask.any():
        raise InputError(
            f"`{ref}` keeps no row, so there is nothing to train on; dropped:"
            f" {decision.manifest.dropped}. Decide with a larger budget."
        )
    order = np.argsort(decided, kind="stable")
    weights = np.concatenate(weight).astype(np.float32)[order]
    mask = mask[order]
    return _Source(decision, table, outputs, decided[order][mask], weights[mask], decided[order])


def _data_of(store: Store, decision: Table) -> Table:
    """The rows that a decision is about: its own input, or the one data set it came from."""
    own = [key for key in decision.manifest.parents if store.manifest(key).step == "read_dataset"]
    if len(own) == 1:
        return store.table(own[0])
    return ancestor(store, decision.manifest, "read_dataset", option="data")


def _check_teacher(outputs: Table, classes: int) -> None:
    if "log_probability" not in outputs.schema.names:
        raise InputError(
            f"`{outputs.manifest.name}` is a table of step `{outputs.manifest.step}`; expected one"
            " of `teacher_outputs`, with a column log_probability."
        )
    found = outputs.schema.field("log_probability").type.list_size
    if found != classes:
        raise InputError(
            f"the teacher `{outputs.manifest.name}` knows {found} classes; the rows have {classes}."
            " Give the outputs of a classifier trained on this data set."
        )


# -- rows ----------------------------------------------------------------------------------------


def _schema(source: _Source, content: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    columns = [
        ("id", pa.int64()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        *content,
        ("weight", pa.float32()),
    ]
    if source.teacher is not None:
        columns.append(("teacher", pa.list_(pa.float32(), len(source.classes))))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _parts(source: _Source) -> Iterator[pa.Table]:
    """The rows to write, train and test mixed as they stand, with weight and teacher."""
    names = np.array(source.classes, object)
    columns = ["id", "source", "split", "label", source.kind]
    for batch in source.data.batches(columns):
        ids = batch.column("id").to_numpy()
        test = np.array(batch.column("split").to_pylist(), object) == TEST
        kept = among(ids, source.kept) & ~test
        source.counts["kept"] += int(kept.sum())
        source.counts[TEST] += int(test.sum())
        source.counts[_NEVER_DECIDED] += int((~among(ids, source.decided) & ~test).sum())
        at = np.flatnonzero(kept | test)
        rows = pa.Table.from_batches([batch]).take(pa.array(at))
        if not rows.num_rows:
            continue
        place = np.searchsorted(source.kept, ids[at])
        weight = np.where(test[at], 1.0, source.weight[np.minimum(place, len(source.kept) - 1)])
        labels = names[rows.column("label").to_numpy()]
        rows = rows.add_column(4, "label_name", pa.array(labels, pa.string()))
        rows = rows.append_column("weight", pa.array(weight, pa.float32()))
        if source.teacher is not None:
            said = source.teacher.lookup(ids[at], columns=["log_probability"])
            rows = rows.append_column("teacher", said.column("log_probability"))
        yield rows


def _write_rows(source: _Source, made: Path) -> None:
    kinds = {"text": pa.string(), "features": pa.list_(pa.float32()), "image": pa.binary()}
    schema = _schema(source, [(source.kind, kinds[source.kind])])
    with (
        pq.ParquetWriter(made / _FILES["rows"], schema) as train,
        pq.ParquetWriter(made / "test.parquet", schema) as test,
    ):
        for rows in _parts(source):
            split = np.array(rows.column("split").to_pylist(), object)
            for name, writer in ((TRAIN, train), (TEST, test)):
                part = rows.filter(pa.array(split == name))
                if part.num_rows:
                    writer.write_table(part.cast(schema))


def _write_ids(source: _Source, made: Path) -> None:
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("keep", pa.bool_(), nullable=False),
            pa.field("score", pa.float32(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
        ]
    )
    source.counts["kept"] = len(source.kept)
    with pq.ParquetWriter(made / _FILES["ids"], schema) as writer:
        for batch in source.decision.batches(["id", "keep", "score", "reason"]):
            names = source.data.lookup(batch.column("id").to_pylist(), columns=["source"])
            rows = pa.Table.from_batches([batch])
            rows = rows.add_column(1, "source", names.column("source"))
            writer.write_table(rows.cast(schema))


# -- images --------------------------------------------------------------------------------------


def class_folders(classes: Sequence[str]) -> dict[str, str]:
    """Class to the name of its folder: the class's own name, made safe where it must be.

    A name that is no plain file name, or that differs from another in case alone, gets its code
    before it.
    """
    lower = Counter(name.lower() for name in classes)
    made = {}
    for code, name in enumerate(classes):
        safe = re.sub(r"[^\w .()+-]", "_", name)[:80].strip()
        plain = safe == name and not name.startswith(".") and lower[name.lower()] == 1
        made[name] = name if plain else f"{code}_{safe}"
    return made


def _write_images(source: _Source, made: Path) -> None:
    folders = class_folders(source.classes)
    for split in (TRAIN, TEST):
        for name in folders.values():
            (made / split / name).mkdir(parents=True, exist_ok=True)
    schema = _schema(source, [("file", pa.string())])
    with pq.ParquetWriter(made / _SIDE, schema) as writer:
        for rows in _parts(source):
            files = [_write_image(made, folders, row) for row in _with_images(rows)]
            at = rows.schema.get_field_index("image")
            writer.write_table(rows.set_column(at, "file", pa.array(files)).cast(schema))


def _with_images(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in rows.select(["id", "split", "label_name", "image"]).to_batches(256):
        yield from batch.to_pylist()


def _write_image(made: Path, folders: Mapping[str, str], row: Mapping[str, Any]) -> str:
    ending = "png" if row["image"].startswith(b"\x89PNG") else "jpg"
    name = f"{row['split']}/{folders[row['label_name']]}/{row['id']}.{ending}"
    (made / name).write_bytes(row["image"])
    return name
