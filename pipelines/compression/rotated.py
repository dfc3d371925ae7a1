"""A rotated copy of a model: the same function, with weights that are easier to quantise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ModelError
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.weight.rotation import Rotation, rotate_block, rotate_outside, rotation
from .model_tables import write_model


def rotated_model(model: StreamedModel, folder: Path, *, seed: int) -> list[Path]:
    """Write a model with its residual stream rotated, block by block; gives the files.

    Embedding and output matrix are apart afterwards (`tie_word_embeddings` false). Weights keep
    the dtypes of the source's files; half precision rounds the rotated weights anew, so the
    function is the same up to that.

    Parameters
    ----------
    model
        Opened in float32, so that nothing is rounded twice.
    folder
        Exists and is empty.
    seed
        Of the rotation.

    Raises
    ------
    ModelError
        A model whose norms are not RMSNorm, or with no final norm or head where such models have
        them.
    """
    turn = rotation(int(model.config.hidden_size), seed=seed)
    config = json.loads((model.folder / "config.json").read_text("utf-8"))
    config["tie_word_embeddings"] = False
    return write_model(folder, _parts(model, turn), config, model.folder)


def _parts(model: StreamedModel, turn: Rotation) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    # Blocks first: one with a norm that cannot be rotated is refused before anything is written.
    for layer in range(model.layers):
        block = model.block(layer)
        rotate_block(block, model.layout, turn)
        names = model.block_names(layer)
        yield (
            f"{layer + 1:05d}",
            {
                stored: block.get_parameter(name).data.to(model.tensors.read(stored).dtype)
                for name, stored in names.items()
            },
        )
    yield "00000", _outside(model, turn)


def _outside(model: StreamedModel, turn: Rotation) -> dict[str, Tensor]:
    whole: Any = model.model
    parent = model.layout.blocks.rpartition(".")[0]
    final = getattr(whole.get_submodule(parent), "norm", None)
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if final is None or "RMSNorm" not in type(final).__name__ or head is None:
        raise ModelError(
            f"{model.folder}: expected a final RMSNorm and an output matrix after the blocks;"
            f" found {type(final).__name__} and {type(head).__name__}. Use gptq in place of rsq."
        )
    made = rotate_outside(embedding.weight.data, final.weight.data, head.weight.data, turn)
    dtype = model.tensors.read(model.disk_name(_weight_name(whole, embedding)) or "").dtype
    found = {name: model.tensors.read(name) for name in model.outside_names()}
    for module, tensor in zip((embedding, final, head), made, strict=True):
        name = _weight_name(whole, module)
        # A tied head has no name in the files: it takes its own.
        stored = model.disk_name(name) or name
        found[stored] = tensor.to(found[stored].dtype if stored in found else dtype)
    return found


def _weight_name(whole: Any, module: Any) -> str:
    return f"{next(name for name, held in whole.named_modules() if held is module)}.weight"
