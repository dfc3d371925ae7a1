"""A compressed model with all of its blocks in memory, to be trained and written again.

Built from `StreamedModel`, so that every architecture with a block layout is read and written
under the names that its files have, experts one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...pruners.models.block_layouts import BlockLayout
from ...pruners.models.streamed_model import StreamedModel
from .model_tables import write_model


class WholeModel:
    """A causal or masked language model, in float32, eval mode and without gradients.

    Eval mode holds in training too: no dropout, so that a loss is the same again.

    Attributes
    ----------
    model, blocks
        transformers' model, and its blocks in order.
    source
        The files it was read from.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self.source = StreamedModel(folder, device=device)
        self.device = device
        self.model: Any = self.source.model
        self.blocks = [self.source.block(layer) for layer in range(self.source.layers)]
        parent, _, name = self.layout.blocks.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(self.blocks))

    @property
    def layout(self) -> BlockLayout:
        """Of the architecture."""
        return self.source.layout

    @property
    def causal(self) -> bool:
        """Whether a token is predicted from those before it; else from those around it."""
        return self.layout.head == "causal"

    def logits(self, input_ids: Tensor, valid: Tensor) -> Tensor:
        """(B, T) int64 and (B, T) bool (False where padded on the right) to (B, T, V)."""
        given: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        if not bool(valid.all()):
            given["attention_mask"] = valid.to(self.device, torch.int64)
        if self.causal:
            given["use_cache"] = False
        made: Tensor = self.model(**given).logits
        return made

    @property
    def vocabulary(self) -> int:
        """Ids that the model has embeddings for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def longest(self) -> int | None:
        """Tokens that its positions reach; None where they are computed as far as wanted."""
        config = self.source.config
        learned = config.model_type in ("gpt2", "opt", "bert")
        return int(config.max_position_embeddings) if learned else None

    def file_names(self) -> dict[str, str]:
        """Path of each parameter in the model to its name in the files; tied ones once."""
        prefix = f"{self.layout.blocks}."
        found = {}
        for name, _ in self.model.named_parameters():
            stored = None if name.startswith(prefix) else self.source.disk_name(name)
            if stored is not None:
                found[name] = stored
        for layer in range(len(self.blocks)):
            for inside, stored in self.source.block_names(layer).items():
                found[f"{prefix}{layer}.{inside}"] = stored
        return found

    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(param.numel() for param in self.model.parameters())

    def stored_dtype(self, stored: str) -> torch.dtype:
        """Of a tensor in the files."""
        return self.source.tensors.read(stored).dtype

    def write(self, folder: Path, changed: Mapping[str, Tensor]) -> list[Path]:
        """Write a model's folder: the source's tensors, and those of `changed` by file name.

        Every tensor keeps the shape and dtype of the source. Files of the source that are neither
        weights, configuration nor tokenizer (codes of quantised weights) are not written.
        """
        unknown = sorted(name for name in changed if name not in self.source.tensors)
        if unknown:
            raise ModelError(
                f"{self.source.folder}: expected changed tensors among those of its files; found"
                f" {', '.join(unknown[:5])}."
            )
        config = json.loads((self.source.folder / "config.json").read_text("utf-8"))
        return write_model(folder, self._parts(changed), config, self.source.folder)

    def _parts(self, changed: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        yield "00000", self._tensors(self.source.outside_names(), changed)
        for layer in range(len(self.blocks)):
            names = list(self.source.block_names(layer).values())
            yield f"{layer + 1:05d}", self._tensors(names, changed)

    def _tensors(self, names: list[str], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name in names:
            kept = self.source.tensors.read(name)
            made[name] = changed[name].to("cpu", kept.dtype) if name in changed else kept
        return made
