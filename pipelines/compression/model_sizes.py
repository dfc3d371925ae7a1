"""How large a model's files are: bytes and parameters by part, and how many weights are zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pruners.models.block_layouts import BlockLayout
from ...pruners.models.streamed_model import TensorFolder

OUTSIDE, ATTENTION, FEED_FORWARD, NORMS = "outside the layers", "attention", "feed-forward", "norms"
PARTS = (ATTENTION, FEED_FORWARD, NORMS, OUTSIDE)
# Of each four consecutive inputs two values, and two bits that say where each stands.
_KEPT_OF_FOUR = 2
_PLACE_BITS = 2


@dataclass(slots=True)
class Size:
    """Of a model's files or of one part of it.

    Attributes
    ----------
    bytes
        Of the tensors.
    parameters
        Numbers that the model computes with; packed codes count one each, scales none.
    weights, zeros
        Of the matrices inside the layers: how many numbers, and how many of them are 0.
    """

    bytes: int = 0
    parameters: int = 0
    weights: int = 0
    zeros: int = 0

    def add(self, other: Size) -> None:
        """Count another one in."""
        self.bytes += other.bytes
        self.parameters += other.parameters
        self.weights += other.weights
        self.zeros += other.zeros


@dataclass(slots=True)
class Sizes:
    """Of a whole model, by part.

    Attributes
    ----------
    parts
        Of `PARTS`, in bytes, parameters, weights and zeros.
    file_bytes
        Of the folder, configuration and tokenizer included.
    bitmask_bytes
        What the tensors would take if matrices in the layers were kept as their values other
        than 0 and a bit for every place. No loader that is installed reads such a file.
    pairs_bytes
        The same for two values of every four; None where some four inputs have more.
    """

    parts: dict[str, Size] = field(default_factory=lambda: {part: Size() for part in PARTS})
    file_bytes: int = 0
    bitmask_bytes: int = 0
    pairs_bytes: int | None = 0

    @property
    def total(self) -> Size:
        """Of all parts together."""
        made = Size()
        for part in self.parts.values():
            made.add(part)
        return made

    @property
    def share_zero(self) -> float:
        """Of the matrices in the layers; NaN where there are none."""
        total = self.total
        return total.zeros / total.weights if total.weights else math.nan

    def count(self, name: str, tensor: Tensor, layout: BlockLayout, *, stored: int) -> None:
        """Count a tensor by its name in the files; `stored` bytes of it are on disk."""
        part = part_of(name, layout)
        size = Size(stored, tensor.numel())
        sparse = stored
        if part in (ATTENTION, FEED_FORWARD) and tensor.dim() > 1:
            size.weights, size.zeros = tensor.numel(), int((tensor == 0).sum())
            item = tensor.element_size()
            sparse = (size.weights - size.zeros) * item + -(-size.weights // 8)
            self._count_pairs(tensor.T if layout.transposed else tensor)
        elif self.pairs_bytes is not None:
            self.pairs_bytes += stored
        self.bitmask_bytes += sparse
        self.parts[part].add(size)

    def _count_pairs(self, weight: Tensor) -> None:
        if self.pairs_bytes is None:
            return
        if not two_of_four(weight):
            self.pairs_bytes = None
            return
        kept = weight.numel() // 4 * _KEPT_OF_FOUR
        self.pairs_bytes += kept * weight.element_size() + -(-kept * _PLACE_BITS // 8)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of (out, in) are other than 0."""
    if weight.shape[-1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= _KEPT_OF_FOUR).all())


def part_of(name: str, layout: BlockLayout) -> str:
    """The part of a model that a tensor belongs to, by its name in the files."""
    _, found, inside = name.partition(f"{layout.blocks.rpartition('.')[2]}.")
    number, _, inside = inside.partition(".")
    if not found or not number.isdecimal():
        return OUTSIDE
    if any(word in inside.lower() for word in ("norm", "ln_")):
        return NORMS
    own = (layout.attention, layout.query, layout.key, layout.value, layout.output)
    return ATTENTION if inside.startswith(tuple(f"{path}." for path in own)) else FEED_FORWARD


def sizes_of(folder: Path, layout: BlockLayout) -> Sizes:
    """Count a folder of a model that is not packed, a tensor at a time."""
    made, tensors = Sizes(), TensorFolder(folder)
    for name in tensors.names():
        tensor = tensors.read(name)
        made.count(name, tensor, layout, stored=bytes_of(tensor))
    made.file_bytes = folder_bytes(folder)
    return made


def bytes_of(tensor: Tensor) -> int:
    """Of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def folder_bytes(folder: Path) -> int:
    """Of all files of a model's folder but codes, which a loader does not read."""
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith("codes-")
    )


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of the first tensor of floating point."""
    return next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
