"""What every export to files shares: a folder that appears whole, and its manifest of digests."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from .._version import __version__
from ..errors import InputError, StoreError
from ..storage import Manifest, Store, Table, file_digest

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """An export on disk: its folder, its manifest, and (where it was read back) its rows."""

    folder: Path
    manifest: dict[str, Any]
    rows: pa.Table | None = None


def check_target(target: Path, force: bool) -> None:
    """Refuse a file, and a folder that is not empty unless `force` replaces it."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; expected a folder to write to.")
    if target.exists() and any(target.iterdir()) and not force:
        raise InputError(
            f"{target} is not empty. Give another folder, or replace it with `force` (--force)."
        )


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside `target` to write in, moved there when the block ends without an error.

    Raises as `check_target`.
    """
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    made.mkdir()
    try:
        yield made
        if force and target.exists():
            shutil.rmtree(target)
        os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def ancestor(store: Store, manifest: Manifest, step: str, *, option: str) -> Table:
    """The one table of that step that a table came from.

    Raises InputError where there is none or several; `option` is what can name it.
    """
    found = [parent for parent in store.lineage(manifest.key) if parent.step == step]
    if len(found) != 1:
        raise InputError(
            f"expected one table of `{step}` among the ancestors of `{manifest.name}`, found"
            f" {len(found)}. Name it with `{option}`."
        )
    return store.table(found[0].key)


def write_manifest(
    store: Store, table: Manifest, made: Path, format: str, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the manifest of the files in a folder: how they came about, and their digests."""
    files = sorted(path for path in made.rglob("*") if path.is_file())
    parents = store.lineage(table.key)
    manifest = {
        "format": format,
        **more,
        "table": table.key,
        "name": table.name,
        "kept": table.kept,
        "dropped": table.dropped,
        "selection": table.notes,
        "models": {f"{m.name}.{name}": sha for m in parents for name, sha in m.models.items()},
        "lineage": [{"name": m.name, "step": m.step, "table": m.key} for m in parents],
        "prunery": __version__,
        "files": {
            path.relative_to(made).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
            }
            for path in files
        },
    }
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(home: Path, formats: Sequence[str]) -> dict[str, Any]:
    """The manifest of an export of one of these formats, after hashing every file again.

    Raises
    ------
    StoreError
        No export is there, or a file is missing, damaged or not listed.
    """
    try:
        found = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(
            f"{home}: expected an export with {MANIFEST}, found none that reads ({error}). Write"
            " one with `prunery export`."
        ) from error
    if not isinstance(found, dict) or found.get("format") not in formats:
        raise StoreError(f"{home / MANIFEST} is not the manifest of an export. Export again.")
    _check_files(home, found["files"])
    return found


def _check_files(home: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    found = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    for name in sorted({*listed, *found} - {MANIFEST}):
        sha = file_digest(home / name) if name in found else "no such file"
        wanted = listed[name]["sha256"] if name in listed else "no such file"
        if sha != wanted:
            raise StoreError(
                f"{home / name}: expected {wanted} as {MANIFEST} lists, found {sha}. The export"
                " was changed after it was written: export again."
            )
