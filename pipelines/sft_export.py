"""A selection written as files for a trainer, and read back with its digests checked.

Each format has exactly the columns that its trainer reads:

trl              input_ids, labels, assistant_masks. TRL 1.7 and later take the labels as they
                 are; from 0.19 to 1.6 packing drops them, and the mask, always applied, holds.
trainer          input_ids, attention_mask, labels, for transformers' Trainer
axolotl          the same three; load it with an empty `type:`
open-instruct    the same three
llama-factory    the same three, saved by `datasets` (`tokenized_path`), under the key train
olmo-core        raw arrays as open-instruct's converter writes them: token_ids_part_0000.npy
                 (the smallest unsigned integers that hold the tokenizer's vocabulary),
                 labels_mask_part_0000.npy (bool), and the borders of samples in a .csv.gz
rows             the surviving rows, untouched: the lines of JSONL as they were read, and
                 those of other files as JSON, one a line

A label is the token's id where it is trained and -100 elsewhere. Sequences are whole (no
padding) and start and end with what the chat template writes, so a trainer must add nothing.
The weights of samples stand in samples.parquet, beside the file that is trained on: no trainer here
reads a weight of its own accord.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import InputError, ModelError
from ..pruners.models.tokenizers import template_sha256, tokenizer_sha256
from ..storage import Store, Table
from .exports import Exported, ancestor, check_target, new_folder, read_manifest, write_manifest
from .sft_tables import EXPORT

ExportFormat = Literal[
    "trl", "trainer", "axolotl", "llama-factory", "open-instruct", "olmo-core", "rows"
]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

_PLAIN = ("input_ids", "attention_mask", "labels")
COLUMNS: dict[str, tuple[str, ...]] = {
    "trl": ("input_ids", "labels", "assistant_masks"),
    "trainer": _PLAIN,
    "axolotl": _PLAIN,
    "llama-factory": _PLAIN,
    "open-instruct": _PLAIN,
    "olmo-core": ("input_ids", "completion_mask"),
}
SIDE = "samples.parquet"
_ARRAYS = ("token_ids_part_0000.npy", "labels_mask_part_0000.npy")
_STEP = "export_sft"


def write_export(
    store: Store,
    ref: str,
    folder: str | Path,
    *,
    format: ExportFormat,
    chats: str | None = None,
    tokenizer: Any = None,
    jsonl: bool = False,
    force: bool = False,
) -> Exported:
    """Write a table of `export_sft` for a trainer.

    The files are made in a folder beside `folder` and moved there when all are whole.

    Parameters
    ----------
    store, ref
        Where the table is, and its name or key.
    folder
        Must not exist or be empty, unless `force` replaces it.
    format
        See the module.
    chats
        Table of `read_chats` with the rows as read, for the format `rows`; found among the
        table's ancestors where not given.
    tokenizer
        A tokenizer to save beside the rows, with its chat template; it must be the one that the
        samples were made with. olmo-core needs it.
    jsonl
        JSON lines in place of Parquet (not for llama-factory and olmo-core).

    Raises
    ------
    InputError
        An unknown format, another kind of table or one without rows, or a folder that is not
        empty.
    ModelError
        The tokenizer is another one than the samples were made with.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format `{format}`; known: {', '.join(FORMATS)}.")
    table = store.table(ref)
    if table.manifest.step != _STEP:
        raise InputError(
            f"`{ref}` is a table of step `{table.manifest.step}`; expected one of `{_STEP}`."
            " Run that step on the decision first."
        )
    if not table.num_rows:
        raise InputError(
            f"`{ref}` keeps no sample, so there is nothing to train on; dropped:"
            f" {table.manifest.dropped}. Decide with a larger budget."
        )
    if jsonl and format in ("llama-factory", "olmo-core"):
        raise InputError(f"{format} reads files of its own, not JSON lines. Leave out `jsonl`.")
    if format == "olmo-core" and tokenizer is None:
        raise InputError(
            "olmo-core reads token ids of a size that the tokenizer's vocabulary decides: give"
            " `tokenizer` (--tokenizer)."
        )
    target = Path(folder)
    check_target(target, force)
    digests = {name: table.manifest.models[name] for name in ("tokenizer", "chat_template")}
    if tokenizer is not None:
        check_tokenizer(tokenizer, digests)
    with new_folder(target, force) as made:
        if format == "olmo-core":
            counts = _write_arrays(table, made, tokenizer.vocab_size)
        else:
            counts = _write_rows(store, table, made, format, chats, jsonl)
        side = _side(table)
        pq.write_table(side, made / SIDE)
        counts["rows"] = side.num_rows
        for name, column in (("tokens", "length"), ("trained_tokens", "trained_tokens")):
            counts[name] = pc.sum(side.column(column)).as_py() or 0
        if tokenizer is not None:
            tokenizer.save_pretrained(made / "tokenizer")
        manifest = write_manifest(store, table.manifest, made, format, {**counts, **digests})
    return Exported(target, manifest)


def load_export(folder: str | Path, tokenizer: Any = None) -> Exported:
    """Read an export back, after hashing every file again.

    Its `rows` have the columns of the format; for the format `rows`, one column `raw` of JSON
    text.

    `tokenizer`, where given, must be the one that the samples were made with. Its chat template
    is not compared: the rows are tokens already.

    Raises
    ------
    StoreError
        No export is there, or a file is missing, damaged or not listed.
    ModelError
        The tokenizer is another one.
    """
    home = Path(folder)
    manifest = read_manifest(home, FORMATS)
    if tokenizer is not None:
        check_tokenizer(tokenizer, {"tokenizer": manifest["tokenizer"]})
    return Exported(home, manifest, _read_rows(home, manifest))


def check_tokenizer(tokenizer: Any, digests: dict[str, str]) -> None:
    """Refuse a tokenizer (or its chat template, where `digests` has it) that is another one."""
    found = {"tokenizer": tokenizer_sha256(tokenizer)}
    if digests.get("chat_template") and tokenizer.chat_template:
        found["chat_template"] = template_sha256(tokenizer.chat_template)
    for name, sha in found.items():
        if sha != digests[name]:
            raise ModelError(
                f"{tokenizer.name_or_path!r}: expected the {name.replace('_', ' ')} with digest"
                f" {digests[name]}, found {sha}. The samples were made with another one: load"
                " that, or tokenise the chats again with this one."
            )


def _write_rows(
    store: Store, table: Table, made: Path, format: ExportFormat, chats: str | None, jsonl: bool
) -> dict[str, Any]:
    """Write the files that are trained on; what the manifest says about them."""
    if format == "rows":
        return {"columns": ["raw"], "data": _write_raw(store, table, made, chats)}
    columns = list(COLUMNS[format])
    schema = pa.schema([table.schema.field(name) for name in columns])
    batches = table.batches(columns=columns)
    data = "train.jsonl" if jsonl else "train.parquet"
    if format == "llama-factory":
        _save_to_disk(made, batches, schema)
        data = "."
    elif jsonl:
        with open(made / data, "w", encoding="utf-8") as file:
            for batch in batches:
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    else:
        with pq.ParquetWriter(made / data, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    return {"columns": columns, "data": data}


def _write_arrays(table: Table, made: Path, vocab_size: int) -> dict[str, Any]:
    """Tokens and mask as bytes without a header, and where each sample starts and ends."""
    kinds = (np.uint8, np.uint16, np.uint32, np.uint64)
    dtype = next(kind for kind in kinds if vocab_size - 1 <= np.iinfo(kind).max)
    start = 0
    with (
        open(made / _ARRAYS[0], "wb") as tokens,
        open(made / _ARRAYS[1], "wb") as masks,
        gzip.GzipFile(made / "token_ids_part_0000.csv.gz", "wb", mtime=0) as borders,
    ):
        for batch in table.batches(columns=["id", *COLUMNS["olmo-core"], "length"]):
            ids = batch.column("input_ids").flatten().to_numpy()
            if len(ids) and ids.max() > np.iinfo(dtype).max:
                raise InputError(
                    f"token id {ids.max()} does not fit the {np.dtype(dtype)} of a vocabulary of"
                    f" {vocab_size}, which OLMo-core would read. Use a tokenizer whose added tokens"
                    " lie inside its vocabulary."
                )
            tokens.write(ids.astype(dtype).tobytes())
            masks.write(batch.column("completion_mask").flatten().to_numpy().astype(bool).tobytes())
            for length in batch.column("length").to_pylist():
                borders.write(f"{start},{start + length}\n".encode())
                start += length
    return {"columns": list(COLUMNS["olmo-core"]), "data": ".", "dtype": np.dtype(dtype).name}


def _save_to_disk(made: Path, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
    """The rows as a saved data set with the one split `train`, in bounded memory."""
    from datasets import Dataset, DatasetDict
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    stream = made / ".stream.arrow"
    with pa.ipc.new_stream(stream, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        DatasetDict({"train": Dataset.from_file(str(stream))}).save_to_disk(str(made))
    finally:
        if not quiet:
            enable_progress_bars()
    stream.unlink()


def _write_raw(store: Store, table: Table, made: Path, chats: str | None) -> str:
    source = (
        store.table(chats)
        if chats
        else ancestor(store, table.manifest, "read_chats", option="chats")
    )
    with open(made / "rows.jsonl", "w", encoding="utf-8") as file:
        for batch in table.batches(columns=["id"]):
            rows = source.lookup(batch.column("id").to_pylist(), columns=["raw"])
            file.writelines(raw + "\n" for raw in rows.column("raw").to_pylist())
    return "rows.jsonl"


def _side(table: Table) -> pa.Table:
    """(id, length, weight, trained tokens) of each sample, in the order of the rows."""
    columns = ["id", "length", "weight"]
    made = []
    for batch in table.batches(columns=[*columns, "completion_mask"]):
        lengths = batch.column("length").to_numpy().astype(np.int64)
        mask = batch.column("completion_mask").flatten().to_numpy()
        trained = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int32)
        made.append(
            pa.table({name: batch.column(name) for name in columns} | {"trained_tokens": trained})
        )
    return pa.concat_tables(made)


def _read_rows(home: Path, manifest: dict[str, Any]) -> pa.Table:
    data = home / manifest["data"]
    if manifest["format"] == "llama-factory":
        from datasets import load_from_disk

        return load_from_disk(str(home))["train"].with_format("arrow")[:]
    if manifest["format"] == "olmo-core":
        return _read_arrays(home, manifest["dtype"])
    if manifest["format"] == "rows":
        with open(data, encoding="utf-8", newline="\n") as file:
            return pa.table({"raw": pa.array([line.rstrip("\n") for line in file], pa.string())})
    if data.suffix == ".jsonl":
        fields = [EXPORT.field(name) for name in manifest["columns"]]
        with open(data, encoding="utf-8") as file:
            return pa.Table.from_pylist([json.loads(line) for line in file], pa.schema(fields))
    return pq.read_table(data)


def _read_arrays(home: Path, dtype: str) -> pa.Table:
    lengths = pq.read_table(home / SIDE, columns=["length"]).column("length").to_numpy()
    borders = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    made = {}
    for name, file, kind in zip(COLUMNS["olmo-core"], _ARRAYS, (dtype, "bool"), strict=True):
        field = EXPORT.field(name)
        values = np.fromfile(home / file, kind)
        flat = pa.array(values.astype(field.type.value_type.to_pandas_dtype()))
        made[name] = pa.ListArray.from_arrays(borders, flat)
    return pa.table(made)
