"""A language model on disk whose blocks are in memory one at a time.

What stands outside the blocks (embeddings, final norm, output layer) is loaded once; a block is
read when it is asked for and freed with its last reference. A model of any depth then passes in
the memory of one block.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import ModelError
from ..finite import all_finite
from .block_layouts import BlockLayout, SplitExperts, layout_of
from .encoders import weight_files
from .language import DType

Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, modules are built with parameters that hold no memory; buffers are real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            empty = nn.Parameter(param.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class TensorFolder:
    """The tensors of a folder's safetensors files by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, "pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), path)
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path}: expected a safetensors file, found {error}. Copy the model again."
                ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it is stored."""
        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


class _EndReachedError(Exception):
    """The last block was called: what stands behind it need not run."""


class _Stub(nn.Module):
    """Stands for a block: notes how it is called, and gives back what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Call | None = None
        self.hidden: Tensor | None = None
        self.answer: Tensor | None = None
        self.ends = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        self.call = (args, kwargs)
        if self.ends:
            raise _EndReachedError
        return hidden_states if self.answer is None else self.answer


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a batch is before the first block.

    Attributes
    ----------
    hidden
        (B, T, d), what the first block takes.
    calls
        For each block, the other arguments that the model calls it with (masks, positions).
    """

    hidden: Tensor
    calls: list[Call]


class StreamedModel:
    """A causal or masked language model, opened for a walk through its blocks.

    Parameters
    ----------
    folder
        Of a model in transformers' format with safetensors weights.
    device, dtype
        Where blocks are run, and in what numbers.
    attention
        "sdpa", or "eager" where attention weights are to be looked at.

    Attributes
    ----------
    config, layout, layers
        Configuration, block layout, and number of blocks.

    Raises
    ------
    ModelError
        An unknown architecture, a file that cannot be read, or weights that are missing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: DType = "float32",
        attention: str = "sdpa",
    ) -> None:
        self.folder = Path(folder)
        self.device, self.dtype = device, getattr(torch, dtype)
        self.config = read_config(self.folder)
        self.layout: BlockLayout = layout_of(self.config)
        self.layers = int(getattr(self.config, self.layout.depth))
        self.tensors = TensorFolder(self.folder)
        self.model = _skeleton(self.config, self.layout, self.dtype, attention)
        self._blocks: list[nn.Module] = list(self.model.get_submodule(self.layout.blocks))
        for block in self._blocks:
            _split(block, self.layout)
        parent, _, name = self.layout.blocks.rpartition(".")
        self._stubs = [_Stub() for _ in range(self.layers)]
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(self._stubs))
        self._load_outside()

    # -- outside the blocks --------------------------------------------------------------------

    def prepare(self, input_ids: Tensor, valid: Tensor | None = None) -> Prepared:
        """A batch up to the first block: `input_ids` (B, T) int64, `valid` (B, T) bool.

        Rows are padded on the right; `valid` None is a batch without padding.
        """
        self._stubs[-1].ends = True
        try:
            with torch.no_grad(), contextlib.suppress(_EndReachedError):
                self._run(input_ids, valid)
        finally:
            self._stubs[-1].ends = False
        first = self._stubs[0].hidden
        assert first is not None
        calls = [stub.call for stub in self._stubs]
        self._forget()
        return Prepared(first, [call for call in calls if call is not None])

    def logits(self, hidden: Tensor, input_ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the model says after its last block: hidden (B, T, d) to logits (B, T, V).

        Gradients flow to `hidden` where it wants them.
        """
        self._stubs[-1].answer = hidden
        try:
            made: Tensor = self._run(input_ids, valid).logits
        finally:
            self._stubs[-1].answer = None
            self._forget()
        return made

    def _run(self, input_ids: Tensor, valid: Tensor | None) -> Any:
        given: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        if valid is not None and not bool(valid.all()):
            given["attention_mask"] = valid.to(self.device, torch.int64)
        if self.layout.head == "causal":
            given["use_cache"] = False
        return self.model(**given)

    def _forget(self) -> None:
        for stub in self._stubs:
            stub.call = stub.hidden = None

    def _load_outside(self) -> None:
        tied = {}
        if getattr(self.config, "tie_word_embeddings", False):
            tied = dict(getattr(self.model, "_tied_weights_keys", None) or {})
        later = []
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            stored = self.disk_name(name)
            if stored is None and name in tied:
                later.append(name)
            else:
                _assign(self.model, name, self._tensor(stored or name))
        for name in later:
            source = self.model.get_parameter(tied[name])
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, source)
        self.model.to(self.device)

    def outside_names(self) -> list[str]:
        """Names in the files of all tensors outside the blocks, sorted."""
        inside = {name for layer in range(self.layers) for name in self.block_names(layer).values()}
        return [name for name in self.tensors.names() if name not in inside]

    # -- blocks --------------------------------------------------------------------------------

    def empty_block(self, layer: int) -> nn.Module:
        """A block of the right shape without weights; its own copy."""
        return copy.deepcopy(self._blocks[layer])

    def block(self, layer: int) -> nn.Module:
        """A block with its weights, in eval mode and without gradients.

        Raises ModelError where a weight is missing, of another shape, or not finite.
        """
        block = self.empty_block(layer)
        names = self.block_names(layer)
        self.fill(block, {name: self._tensor(stored) for name, stored in names.items()}, layer)
        return block

    def fill(self, block: nn.Module, tensors: Mapping[str, Tensor], layer: int) -> None:
        """Give an empty block its tensors, by their names inside the block."""
        for name, tensor in tensors.items():
            _assign(block, name, tensor.to(self.device))
        empty = [name for name, param in block.named_parameters() if param.is_meta]
        if empty:
            raise ModelError(
                f"{self.folder}: expected all weights of layer {layer}; found none for"
                f" {', '.join(empty[:5])}. Give the whole model, saved by save_pretrained."
            )
        block.to(self.device).eval().requires_grad_(False)

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """A block over hidden (B, T, d) with the arguments that `prepare` found for it."""
        made = block(hidden, *call[0], **call[1])
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    def block_names(self, layer: int) -> dict[str, str]:
        """Name inside the block to name in the files, for every tensor of a block."""
        found = {}
        for name, _ in self._blocks[layer].named_parameters():
            stored = self.disk_name(f"{self.layout.blocks}.{layer}.{self.stored(name)}")
            found[name] = stored or f"{self.layout.blocks}.{layer}.{self.stored(name)}"
        return found

    def stored(self, name: str) -> str:
        """What a name inside a block is called in files."""
        for ours, theirs in (self.layout.disk or {}).items():
            if ours == "mlp." or ".experts." in name:
                name = name.replace(ours, theirs)
        return name

    def disk_name(self, name: str) -> str | None:
        """The name in the files of a parameter of the whole model, or None."""
        prefix = f"{self.model.base_model_prefix}."
        for found in (name, name.removeprefix(prefix), prefix + name):
            if found in self.tensors:
                return found
        return None

    def _tensor(self, stored: str) -> Tensor:
        if stored not in self.tensors:
            raise ModelError(
                f"{self.folder}: expected a tensor {stored}, found none. Give the whole model,"
                " saved by save_pretrained (adapters merged first)."
            )
        tensor = self.tensors.read(stored)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ModelError(
                f"{self.folder}: expected finite weights; found a NaN or an infinity in {stored}."
                " Copy the model again, or use a checkpoint from before it diverged."
            )
        return tensor.to(self.dtype)


def read_config(folder: Path) -> Any:
    """The configuration of a model's folder; no code that comes with it runs."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{folder}: expected config.json of an architecture that transformers knows; found"
            f" {type(error).__name__}: {error}."
        ) from error


def _skeleton(config: Any, layout: BlockLayout, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto: Any = AutoModelForCausalLM if layout.head == "causal" else AutoModelForMaskedLM
    with empty_parameters():
        made = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    return made.eval().requires_grad_(False)


def _split(block: nn.Module, layout: BlockLayout) -> None:
    """Put experts one by one in the place of stacked ones."""
    if layout.experts is None:
        return
    try:
        stacked: Any = block.get_submodule(layout.experts)
    except AttributeError:  # a dense block among blocks of experts
        return
    count, double, hidden = stacked.gate_up_proj.shape
    with empty_parameters():
        made = SplitExperts(count, hidden, double // 2, stacked.act_fn)
    parent, _, name = layout.experts.rpartition(".")
    setattr(block.get_submodule(parent), name, made)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = owner._parameters.get(leaf)
    if old is None or old.shape != tensor.shape:
        shape = "none" if old is None else tuple(old.shape)
        raise ModelError(
            f"{name}: expected a tensor of shape {shape} by the configuration; found"
            f" {tuple(tensor.shape)}. The weights belong to another configuration."
        )
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
