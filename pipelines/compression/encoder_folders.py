"""The folder of a sentence-transformers model: loading, pruning, and keeping it in a table.

Attachments have flat names, so `1_Pooling/config.json` is kept as `1_Pooling--config.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file

from ...errors import ModelError
from ...pruners.models.device import pick_device
from ...pruners.models.encoders import HUB_PATTERNS, weight_files
from ...storage import Table
from ...storage.ids import digest

_BETWEEN = "--"


def load_encoder(folder: Path, device: str | None) -> tuple[Any, Any]:
    """A sentence-transformers model and the transformer inside it, float32, in eval mode.

    Raises ModelError where it cannot be read, or its first module is no transformer.
    """
    import faiss  # noqa: F401  before torch: two OpenMP runtimes the other way round can crash
    from sentence_transformers import SentenceTransformer

    from ..models import without_bars

    try:
        with without_bars():
            model: Any = SentenceTransformer(
                str(folder),
                device=pick_device(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": "float32"},
            )
        network = model[0].auto_model
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{folder}: expected a sentence-transformers model that starts with a transformer;"
            f" found {type(error).__name__}: {error}."
        ) from error
    return model.eval().requires_grad_(False), network


def transformer_folder(folder: Path) -> Path:
    """Where the weights lie in the folder: at its root, or where modules.json says."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return folder
    modules = json.loads(listed.read_text())
    return folder / modules[0]["path"] if modules else folder


def write_pruned(
    source: Path, folder: Path, masks: Mapping[str, npt.NDArray[np.bool_]], prefix: str
) -> None:
    """Copy a model's folder with weights at 0 where the masks (by path in the network) are False.

    Everything else, the weights' dtype and names too, stays as it was; code and pickles are not
    copied. `folder` exists and is empty; `prefix` is what names in files may begin with.

    Raises ModelError where a masked matrix is in no file.
    """
    import torch

    weights = transformer_folder(source)
    replaced = {path.relative_to(source) for path in weight_files(weights)}
    left = {f"{path}.weight": mask for path, mask in masks.items()}
    for path in _files(source):
        to = folder / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if path not in replaced:
            shutil.copyfile(source / path, to)
            continue
        tensors = load_file(source / path)
        for name in tensors:
            mask = left.pop(name, None)
            if mask is None:
                mask = left.pop(name.removeprefix(f"{prefix}."), None)
            if mask is not None:
                tensors[name] = tensors[name].masked_fill(torch.from_numpy(~mask), 0.0)
        save_file(tensors, to, metadata={"format": "pt"})
    if left:
        raise ModelError(
            f"{source}: expected a tensor {next(iter(left))} in its safetensors files, found none."
            " Save the model again by save_pretrained."
        )


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and any(fnmatch(path.name, p) for p in HUB_PATTERNS):
            yield inside


def attachments(folder: Path) -> dict[str, Path]:
    """Name of each file of a folder as an attachment, and where it is."""
    return {
        _BETWEEN.join(path.relative_to(folder).parts): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def encoder_folder(table: Table) -> Path:
    """Folder of the model that a `prune_encoder` table holds, made once under the cache.

    It is what any step takes as `encoder`, and sentence-transformers as a model.
    """
    listed = {item["name"]: item["sha256"] for item in table.manifest.attachments}
    home = os.environ.get("PRUNERY_CACHE") or Path.home() / ".cache" / "prunery"
    folder = Path(home, "encoders", digest(listed)[:32])
    if folder.is_dir():
        return folder
    made = folder.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        for name in listed:
            to = made.joinpath(*name.split(_BETWEEN))
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(table.attachment(name), to)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
