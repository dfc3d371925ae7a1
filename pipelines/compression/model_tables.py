"""A model kept in a table: its files as attachments, and the folder they are loaded from.

One safetensors file a layer, one for what stands outside the layers, an index, the configuration
and the tokenizer's files: a folder of them loads with transformers as any other.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage import Table, TableWriter

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
# Files of a model's folder that are no weights and belong to it.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
_NUMBER = re.compile(r"os error (\d+)")
MODEL_STEPS = ("compress_weights", "compensate_weights", "recover_weights", "export_model")


def model_folder(table: Table) -> Path:
    """Folder of a table's model, made once under the cache; files are linked where they can be."""
    from ..causal_files import folder_of

    return folder_of(table, {item["name"]: item["name"] for item in table.manifest.attachments})


def model_source(name: str | None, table: Table | None) -> str:
    """Folder or hub id of a model: as an option names it, or of the table given as input.

    The table is that of a `train_lm` step or of one that makes a compressed model (MODEL_STEPS).
    """
    from ..causal_files import causal_source

    if table is not None and table.manifest.step in MODEL_STEPS and name is None:
        return str(model_folder(table))
    return causal_source(name, table)


def write_model(
    folder: Path,
    parts: Iterator[tuple[str, Mapping[str, Tensor]]],
    config: Mapping[str, Any],
    beside: Path,
) -> list[Path]:
    """Write a model's folder from its tensors, part by part.

    Parameters
    ----------
    folder
        Exists and is empty.
    parts
        Label and tensors by their names in files; each part becomes one file. At most one part
        is held at a time.
    config
        What config.json says.
    beside
        Folder of the source model: tokenizer and generation configuration are copied from it.

    Returns the files that were written, in order of name.

    Raises OSError where one cannot be written.
    """
    names: dict[str, str] = {}
    total = 0
    for label, tensors in parts:
        file = f"part-{label}.safetensors"
        made = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_tensors(made, folder / file)
        names |= dict.fromkeys(made, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    files = sorted(set(names.values()))
    count = len(files)
    final = {
        file: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, file in enumerate(files, 1)
    }
    for file, to in final.items():
        (folder / file).rename(folder / to)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[file] for name, file in sorted(names.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    copy_beside(beside, folder)
    return sorted(path for path in folder.iterdir() if path.is_file())


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file.

    Raises OSError where it cannot be written: safetensors has an error of its own for that, which
    tells the system's number in words.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # One entry of metadata: two would change places from run to run.
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what belongs to a model and is neither weights nor configuration."""
    for pattern in _BESIDE:
        for path in sorted(source.glob(pattern)):
            if path.name not in ("config.json", INDEX) and not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())


def attach_model(writer: TableWriter, files: Sequence[Path]) -> None:
    """Attach the files of a model's folder to a table; they are moved."""
    for path in files:
        writer.attach(path.name, path, move=True)
