"""Quantised codes as files hold them: bits side by side in 32-bit words, and how a loader is told.

The form is `pack-quantized` of compressed-tensors (its package, not a paper, defines it), which
transformers and vLLM read: element i of a row stands at bits i·b to (i+1)·b of the row, shifted to
be unsigned, the lowest bit first. Words are little-endian and rows are padded with zero bits.
Widths that divide 32 are the same in all versions of that package; 3 bits cross words, which it
reads from 0.20 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import ModelError
from ...pruners.models.block_layouts import layout_of

BITS = (2, 3, 4, 8)
_ROWS = 256  # packed at a time: single bits take eight times the codes' memory


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix: weight = (codes - zero) · scale.

    Attributes
    ----------
    codes
        (out, in) int8, signed: from -2^(bits-1) to 2^(bits-1) - 1.
    scale
        (out, groups) float32; a group is in / groups consecutive inputs.
    zero
        (out, groups) int8, or None for a symmetric grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def group_size(self) -> int | None:
        """Inputs a scale serves; None where groups are not equal."""
        inputs, groups = self.codes.shape[1], self.scale.shape[1]
        return inputs // groups if inputs % groups == 0 else None

    def least_bits(self) -> int:
        """The fewest bits that hold all codes and zeros."""
        held = [self.codes] if self.zero is None else [self.codes, self.zero]
        low, high = (min(int(t.min()) for t in held), max(int(t.max()) for t in held))
        return next(b for b in BITS if low >= -(2 ** (b - 1)) and high < 2 ** (b - 1))


@dataclass(frozen=True, slots=True, order=True)
class Scheme:
    """What matrices of one kind of grid share; `group_size` 0 is a whole row."""

    bits: int
    group_size: int
    symmetric: bool

    def weights(self) -> dict[str, Any]:
        """The `weights` entry of a configuration group."""
        grouped = bool(self.group_size)
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False,
        }


class CodesFolder:
    """The codes beside a model's weights (`codes-*.safetensors`), read one matrix at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("codes-*.safetensors")):
            with safe_open(path, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), path)

    def names(self) -> list[str]:
        """Names in the files of the quantised matrices, without `.weight`, sorted."""
        return sorted(n.removesuffix(".codes") for n in self._files if n.endswith(".codes"))

    def read(self, name: str) -> Codes:
        """One matrix.

        Raises ModelError where its scale is missing, or shapes and numbers do not fit.
        """
        codes, scale = (self._tensor(f"{name}.{part}") for part in ("codes", "scale"))
        zero = self._tensor(f"{name}.zero") if f"{name}.zero" in self._files else None
        rows = codes.shape[0]
        fits = scale.dim() == 2 and scale.shape[0] == rows and codes.dtype == torch.int8
        if not fits or (zero is not None and zero.shape != scale.shape):
            raise ModelError(
                f"{name}: expected int8 codes (out, in) with a scale for each group of every row;"
                f" found codes {codes.dtype} {tuple(codes.shape)}, scale {tuple(scale.shape)}."
                " Quantise the model again."
            )
        if not bool(torch.isfinite(scale).all()):
            raise ModelError(f"{name}: expected finite scales, found a NaN or an infinity.")
        return Codes(codes, scale, zero)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(
                f"expected a tensor {name} beside the codes, found none. Quantise the model again."
            )
        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack (rows, columns) int8 of `bits` bits each into (rows, ceil(columns·bits/32)) int32."""
    values = codes.numpy()
    columns = values.shape[1]
    words = -(-columns * bits // 32)
    made = np.empty((len(values), words), "<i4")
    for start in range(0, len(values), _ROWS):
        made[start : start + _ROWS] = _packed(values[start : start + _ROWS], bits, words)
    return torch.from_numpy(made.astype(np.int32))


def _packed(values: npt.NDArray[np.int8], bits: int, words: int) -> npt.NDArray[np.int32]:
    unsigned = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    single = np.unpackbits(unsigned[:, :, None], axis=2, count=bits, bitorder="little")
    flat = single.reshape(len(values), -1)
    padded = np.pad(flat, ((0, 0), (0, 32 * words - flat.shape[1])))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def packed_tensors(name: str, codes: Codes, bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands in a file in place of `name.weight`; scales in the model's own dtype.

    A loader casts scales to that dtype anyway: what is stored is then what is run.

    Raises ModelError where a code does not fit into `bits`.
    """
    least = codes.least_bits()
    if least > bits:
        raise ModelError(
            f"{name}: expected codes of {bits} bits, found some that need {least}. The table says"
            " other bits than were used: quantise the model again."
        )
    made = {
        f"{name}.weight_packed": pack(codes.codes, bits),
        f"{name}.weight_scale": codes.scale.to(dtype),
        f"{name}.weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
    }
    if codes.zero is not None:
        made[f"{name}.weight_zero_point"] = pack(codes.zero.T.contiguous(), bits).T.contiguous()
    return made


def quantization_config(schemes: Mapping[str, Scheme], linear: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Parameters
    ----------
    schemes
        Module path in the model to the scheme of its weight.
    linear
        Paths of all linear modules of the model, in order. Those without a scheme are ignored.
    """
    kinds = sorted(set(schemes.values()))
    groups = {}
    for number, kind in enumerate(kinds):
        # One kind is told by its class, as loaders that fuse matrices expect.
        named = [name for name in linear if schemes.get(name) == kind]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else named,
            "weights": kind.weights(),
            "input_activations": None,
            "output_activations": None,
        }
    made: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in schemes],
    }
    if not all(kind.symmetric for kind in kinds):
        # transformers 5.23 loads packed zero points by this path alone.
        made["dequantize"] = True
    return made


def linear_modules(config: Any) -> list[str]:
    """Paths of the linear modules of a configuration's model with its head; no weights are made.

    Experts that transformers keeps stacked, and GPT-2's transposed matrices, are none.
    """
    import transformers

    auto = (
        transformers.AutoModelForCausalLM
        if layout_of(config).head == "causal"
        else transformers.AutoModelForMaskedLM
    )
    with torch.device("meta"):
        model: Any = auto.from_config(config)  # type: ignore[no-untyped-call]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def in_files(module: str, names: Iterable[str], prefix: str) -> str | None:
    """What a module is called in files, which may leave out the model's prefix or add it."""
    held = set(names)
    for found in (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"):
        if found in held:
            return found
    return None
