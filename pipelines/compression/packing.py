"""A compressed model as the folder that people load: dtype, packed codes, and what it weighs.

Nothing is written but a new folder, which appears whole or not at all; the source is only read,
a tensor at a time.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import InputError, ModelError, StoreError
from ...pruners.models.block_layouts import BlockLayout, layout_of
from ...pruners.models.encoders import weight_files
from ...pruners.models.streamed_model import TensorFolder, read_config
from ..exports import new_folder
from .model_sizes import Sizes, bytes_of, folder_bytes, sizes_of
from .model_tables import write_model
from .packed_codes import (
    Codes,
    CodesFolder,
    Scheme,
    in_files,
    linear_modules,
    packed_tensors,
    quantization_config,
)

Stored = Literal["source", "float32", "bfloat16", "float16"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """How a model is stored.

    Attributes
    ----------
    dtype
        Of all floating-point tensors; "source" leaves each as it is.
    bits
        Name in the files of a quantised matrix, without `.weight`, to its bits. A matrix that is
        not named takes the most that any of them needs.
    dense
        Folder of the model before compression, for the report; None compares with the source.
    """

    dtype: Stored = "source"
    bits: Mapping[str, int] = field(default_factory=dict)
    dense: Path | None = None


@dataclass(frozen=True, slots=True)
class SizeReport:
    """What packing did.

    Attributes
    ----------
    before, after
        Of the model before compression (or of the source), and of the packed folder.
    packed
        How many matrices are stored as codes.
    notes
        What a reader must know about these numbers, in sentences.
    """

    before: Sizes
    after: Sizes
    packed: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "packed": self.packed,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class _Packing:
    """What is decided before the first byte is written."""

    layout: BlockLayout
    codes: CodesFolder
    bits: Mapping[str, int]  # name in files to bits, for those that are packed
    config: dict[str, Any]
    left: tuple[str, ...]  # quantised matrices that stay dense


def pack_model(source: Path, out: Path, options: PackOptions | None = None) -> SizeReport:
    """Write a compressed model as a folder that transformers loads.

    Matrices with codes of 2, 3, 4 or 8 bits are packed (see `packed_codes`) where the loader can
    take them: linear modules whose inputs fall into equal groups. Others stay as the dense
    numbers that their codes stand for, and the report says so.

    Parameters
    ----------
    source
        Folder of the model with dense weights, and `codes-*.safetensors` where it is quantised.
    out
        Folder to be made.

    Raises
    ------
    InputError
        `out` exists; it is never overwritten.
    ModelError
        The source cannot be read, or a weight is not finite or does not fit into the dtype asked
        for.
    StoreError
        The folder cannot be written; nothing of it is left behind.
    """
    chosen = options or PackOptions()
    if out.exists():
        raise InputError(
            f"{out}: expected a folder that does not exist yet, found one. Name another, or remove"
            " it: an export never overwrites."
        )
    packing = _decide(source, chosen)
    after = Sizes()
    with _disk(out), new_folder(out, force=False) as made:
        files = write_model(made, _parts(source, packing, chosen, after), packing.config, source)
        for file in files:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        after.file_bytes = folder_bytes(made)
    before = sizes_of(chosen.dense or source, packing.layout)
    return SizeReport(before, after, len(packing.bits), _notes(before, after, packing))


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A failure to write as a StoreError that names the folder."""
    try:
        yield
    except OSError as error:
        advice = (
            "the disk is full (or a limit is reached): free some"
            if error.errno in _FULL
            else "mend that"
        )
        raise StoreError(
            f"{folder}: expected to write the model there, found: {error}; {advice} and run again."
            " Nothing was left behind, and the source is as it was."
        ) from error


# -- what is packed ------------------------------------------------------------------------------


def _decide(source: Path, options: PackOptions) -> _Packing:
    config = read_config(source)
    layout = layout_of(config)
    codes = CodesFolder(source)
    said: dict[str, Any] = json.loads((source / "config.json").read_text())
    if options.dtype != "source":
        said.pop("torch_dtype", None)
        said["dtype"] = options.dtype
    names = codes.names()
    if not names:
        return _Packing(layout, codes, {}, said, ())
    linear = linear_modules(config)
    found = {name: codes.read(name) for name in names}
    most = max(one.least_bits() for one in found.values())
    bits = {name: int(options.bits.get(name, most)) for name in names}
    kinds = _schemes(found, bits)
    modules = {
        name: module
        for module in linear
        if (name := in_files(module, names, layout.blocks.partition(".")[0])) is not None
    }
    chosen = _packable(kinds, modules, TensorFolder(source).names())
    if chosen:
        schemes = {modules[name]: kind for name, kind in chosen.items() if name in modules}
        said["quantization_config"] = quantization_config(schemes, linear)
    left = tuple(name for name in names if name not in chosen)
    return _Packing(layout, codes, {name: kind.bits for name, kind in chosen.items()}, said, left)


def _packable(
    kinds: Mapping[str, Scheme], modules: Mapping[str, str], stored: Sequence[str]
) -> dict[str, Scheme]:
    """The matrices that the loader takes as codes, by what transformers 5.23 was seen to load.

    Zero points go with one kind of grid in the whole model. Experts, which it stacks, are read
    where all of them and whatever else is packed have one kind, without zero points; else such a
    model cannot have packed codes at all.
    """
    experts = {name.removesuffix(".weight") for name in stored if ".experts." in name}
    if experts:
        alike = len(set(kinds.values())) == 1 and next(iter(kinds.values())).symmetric
        return dict(kinds) if alike and experts <= set(kinds) else {}
    made = {name: kind for name, kind in kinds.items() if name in modules}
    if len(set(made.values())) > 1:
        made = {name: kind for name, kind in made.items() if kind.symmetric}
    return made


def _schemes(found: Mapping[str, Codes], bits: Mapping[str, int]) -> dict[str, Scheme]:
    """The kind of grid of every matrix whose groups are equal.

    A row that is one group is told as the groups of the others where it is as long as one.
    """
    sizes = {name: one.group_size for name, one in found.items() if one.group_size is not None}
    grouped = {size for name, size in sizes.items() if size < found[name].codes.shape[1]}
    return {
        name: Scheme(
            bits[name],
            size if size < found[name].codes.shape[1] or size in grouped else 0,
            found[name].zero is None,
        )
        for name, size in sizes.items()
    }


# -- writing -------------------------------------------------------------------------------------


def _parts(
    source: Path, packing: _Packing, options: PackOptions, sizes: Sizes
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The source's files one by one, as they are to be stored; counts them in `sizes`."""
    for number, path in enumerate(weight_files(source)):
        made: dict[str, Tensor] = {}
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = _cast(name, opened.get_tensor(name), options.dtype)
                stored = _stored(name, tensor, packing)
                made |= stored
                size = sum(bytes_of(part) for part in stored.values())
                sizes.count(name, tensor, packing.layout, stored=size)
        yield f"{number:05d}", made


def _stored(name: str, tensor: Tensor, packing: _Packing) -> dict[str, Tensor]:
    bare = name.removesuffix(".weight")
    if bare == name or bare not in packing.bits:
        return {name: tensor}
    codes = packing.codes.read(bare)
    if codes.codes.shape != tensor.shape:
        raise ModelError(
            f"{name}: expected codes of the weight's shape {tuple(tensor.shape)}, found"
            f" {tuple(codes.codes.shape)}. Quantise the model again."
        )
    return packed_tensors(bare, codes, packing.bits[bare], tensor.dtype)


def _cast(name: str, tensor: Tensor, dtype: Stored) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"{name}: expected finite weights to export, found a NaN or an infinity. Look at the"
            " rows of this layer in the compressed table, and make it again."
        )
    if dtype == "source":
        return tensor
    made = tensor.to(getattr(torch, dtype))
    if not bool(torch.isfinite(made).all()):
        raise ModelError(
            f"{name}: expected weights that {dtype} can hold, found"
            f" {float(tensor.abs().max()):.3g}. Use `dtype: bfloat16`, whose range is wider."
        )
    return made


# -- the report ----------------------------------------------------------------------------------


def _notes(before: Sizes, after: Sizes, packing: _Packing) -> tuple[str, ...]:
    made: list[str] = []
    sparse = after.share_zero
    if packing.left:
        made.append(
            f"{len(packing.left)} quantised matrices stay dense, because no loader takes packed"
            f" codes for them (such as {packing.left[0]}): their size on disk did not fall."
        )
    if packing.bits and min(packing.bits.values()) < 4:
        made.append(
            "Codes of 2 and 3 bits are read by compressed-tensors from 0.20 on; inference engines"
            " with kernels of their own often take 4 and 8 bits alone."
        )
    if sparse > 0.01 and not packing.codes.names():
        made.append(
            f"{sparse:.1%} of the layers' weights are 0, which makes a dense file no smaller: as"
            f" values and a bit a place it would have {_mib(after.bitmask_bytes)}, for which"
            " there is no loader."
        )
        if after.pairs_bytes is not None:
            made.append(
                "At most two of every four inputs are kept: stored as 2:4 it would have"
                f" {_mib(after.pairs_bytes)}; only kernels for 2:4 make use of that, in memory."
            )
    if before.file_bytes and after.file_bytes >= 0.99 * before.file_bytes:
        made.append("The size on disk did not fall.")
    return tuple(made)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def bits_by_name(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], layout: BlockLayout
) -> dict[str, int]:
    """Bits of each quantised matrix, from the rows of a compressed table.

    Rows number layers as they were; those that were dropped are missing in the files' numbers.
    """
    gone = sorted(row["layer"] for row in rows if row["unit"] == "layer" and not row["kept"])
    made: dict[str, int] = {}
    for row in rows:
        if row["bits"] is None or row["layer"] in gone:
            continue
        layer = row["layer"] - sum(lost < row["layer"] for lost in gone)
        module = f"{layout.blocks}.{layer}.{_in_file(row['module'], layout)}"
        name = in_files(module, names, layout.blocks.partition(".")[0])
        if name is not None:
            made[name] = int(row["bits"])
    return made


def _in_file(module: str, layout: BlockLayout) -> str:
    made = f"{module}."
    for ours, theirs in (layout.disk or {}).items():
        if ours == "mlp." or ".experts." in made:
            made = made.replace(ours, theirs)
    return made.removesuffix(".")
