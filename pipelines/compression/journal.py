"""How far a walk through the layers has come, kept so that a killed one goes on.

The folder is one of work.py's. A layer's tensors and rows are written, flushed and renamed into
place before the state says that it is done; what flows from layer to layer (hidden states, a file
a batch) stays until the layer after it is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import StoreError
from ...storage.ids import file_digest
from .model_tables import save_tensors


class LayerJournal:
    """The layers that are done, with what they made, and the hidden states between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> int:
        """Number of leading layers whose files are whole."""
        digests = self._state()
        for layer, digest in enumerate(digests):
            path = self._layer(layer)
            if not path.is_file() or file_digest(path) != digest:
                return layer
        return len(digests)

    def record(
        self, layer: int, tensors: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Say that a layer is done. `rows` are JSON-able."""
        made = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        _replace(self._rows(layer), json.dumps(list(rows)).encode())
        _write(self._layer(layer), made)
        digests = [*self._state()[:layer], file_digest(self._layer(layer))]
        _replace(self.folder / "state.json", json.dumps(digests).encode())
        for path in self.folder.glob(f"hidden-{layer:05d}-*.safetensors"):
            path.unlink()

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """What a layer made."""
        with safe_open(self._layer(layer), "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def rows(self, layer: int) -> list[dict[str, Any]]:
        """The rows of a layer."""
        found: list[dict[str, Any]] = json.loads(self._rows(layer).read_bytes())
        return found

    def file(self, layer: int) -> Path:
        """The safetensors file of a layer that is done."""
        return self._layer(layer)

    def put_hidden(self, layer: int, batch: int, hidden: Tensor) -> None:
        """Keep what a layer takes of one batch."""
        _write(self._hidden(layer, batch), {"hidden": hidden.contiguous().cpu()})

    def hidden(self, layer: int, batch: int) -> Tensor:
        """What a layer takes of one batch."""
        with safe_open(self._hidden(layer, batch), "pt") as opened:
            hidden: Tensor = opened.get_tensor("hidden")
        return hidden

    def has_hidden(self, layer: int, batches: int) -> bool:
        """Whether what a layer takes is there for all batches, in whole files."""
        for batch in range(batches):
            try:
                with safe_open(self._hidden(layer, batch), "pt") as opened:
                    opened.get_slice("hidden")
            except (OSError, SafetensorError):
                return False
        return True

    def remove(self) -> None:
        """Delete the folder: the table is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self) -> list[str]:
        try:
            found: list[str] = json.loads((self.folder / "state.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return found

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def _rows(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.json"

    def _hidden(self, layer: int, batch: int) -> Path:
        return self.folder / f"hidden-{layer:05d}-{batch:05d}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with unfinished(path) as made:
        save_tensors(tensors, made)
        with made.open("rb+") as file:
            os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    with unfinished(path) as made, made.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends without an error.

    Raises StoreError where it cannot be written, and leaves nothing of it then.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield made
        os.replace(made, path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise StoreError(
            f"{path}: expected to write the work of a layer, found: {error}. Free some space, or"
            " set PRUNERY_CACHE to a folder on a disk with more, and run again: in the same"
            " folder, layers that are done are not made again."
        ) from error
