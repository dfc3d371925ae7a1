"""A causal model kept in a table of the store: its files, and the folder they are loaded from.

Attachments have flat names under a digest; a loader wants a folder. The folder is made once
under the cache (`PRUNERY_CACHE`, else `~/.cache/prunery`), named by what is in it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from ..errors import RecipeError, StoreError
from ..storage import Table
from ..storage.ids import digest

WEIGHTS = "model.safetensors"
_CHECKPOINT = "checkpoint-{}.safetensors"
_STEP, _NUMBERED = "step:", "checkpoint:"


def checkpoint_name(number: int) -> str:
    """Attachment that holds the weights of a checkpoint, from 0."""
    return _CHECKPOINT.format(number)


def checkpoints_of(table: Table) -> int:
    """How many checkpoints a `train_lm` table holds beside its final weights."""
    names = {item["name"] for item in table.manifest.attachments}
    return sum(checkpoint_name(number) in names for number in range(len(names)))


def causal_from_table(table: Table, checkpoint: int | None = None) -> Path:
    """Folder of a `train_lm` table's model, or of one of its checkpoints (from 0).

    Files are linked to the store where they lie on the same disk, else copied. Raises
    RecipeError where there is no such checkpoint.
    """
    count = checkpoints_of(table)
    if checkpoint is not None and not 0 <= checkpoint < count:
        raise RecipeError(
            f"expected a checkpoint of `{table.manifest.name}` from 0 to {count - 1}; found"
            f" {checkpoint}. Raise `checkpoints` of its train_lm step."
        )
    weights = WEIGHTS if checkpoint is None else checkpoint_name(checkpoint)
    sources = {WEIGHTS: weights} | {
        item["name"]: item["name"]
        for item in table.manifest.attachments
        if not item["name"].endswith(".safetensors")
    }
    return folder_of(table, sources)


def folder_of(table: Table, sources: Mapping[str, str]) -> Path:
    """A folder under the cache with some attachments: name of the file to name of the attachment.

    It is named by what is in it, and made once.
    """
    sha = {item["name"]: item["sha256"] for item in table.manifest.attachments}
    key = digest({name: sha[source] for name, source in sources.items()})
    home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
    folder = Path(home, "causal", key[:32])
    wanted = {name: table.attachment(source) for name, source in sources.items()}
    if not _whole(folder, wanted):
        _assemble(folder, wanted)
    return folder


def causal_source(name: str | None, table: Table | None) -> str:
    """What `load_causal` takes, for a model as an option names it.

    `name` is a folder or hub id; "step:NAME" or None, the model of the `train_lm` table given
    as input; or "checkpoint:0" and so on, a checkpoint of it.

    Raises RecipeError where the name asks for a table and none was given.
    """
    numbered = name is not None and name.startswith(_NUMBERED)
    if name is not None and not numbered and not name.startswith(_STEP):
        return name
    if table is None:
        raise RecipeError(
            f"model {name or '(none given)'}: expected the train_lm step as input `model`, found"
            " none. Name the step under `inputs`, or give a folder or a hub id."
        )
    if not numbered or name is None:
        return str(causal_from_table(table))
    text = name.removeprefix(_NUMBERED)
    if not text.isdecimal():
        raise RecipeError(f"model {name}: expected checkpoint:0, checkpoint:1 and so on.")
    return str(causal_from_table(table, int(text)))


def _whole(folder: Path, wanted: Mapping[str, Path]) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == source.stat().st_size
        for name, source in wanted.items()
    )


def _assemble(folder: Path, wanted: Mapping[str, Path]) -> None:
    """Make the folder beside its place and move it there; who is second keeps the first's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # files were lost
        shutil.rmtree(folder, ignore_errors=True)
    made = folder.with_name(f".{uuid.uuid4().hex}.tmp")
    made.mkdir()
    try:
        for name, source in wanted.items():
            try:
                os.link(source, made / name)
            except OSError:
                shutil.copyfile(source, made / name)
        os.rename(made, folder)
    except OSError as error:
        if not _whole(folder, wanted):
            raise StoreError(
                f"{folder}: expected to put a model's files there, found: {error}. Free some space,"
                " or set PRUNERY_CACHE to a folder on a disk with more, and run again."
            ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
