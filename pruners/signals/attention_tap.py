"""The queries and keys of one attention layer, taken as they reach its attention function.

Transformers' models hand their queries and keys (after rotary embedding and any q/k norm) to a
function that they look up by the name in `config._attn_implementation`. The tap gives one layer
a private copy of its configuration whose name leads to a function of ours, which notes what it
was given and calls the one that would have run. So the output is the same to the last bit with
eager attention, SDPA and flash attention, and no other layer or model is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import InputError, ModelError

# Kinds of layer (config.layer_types) whose mask is causal, with or without a window.
_CAUSAL_KINDS = frozenset({"full_attention", "sliding_attention", "attention"})
_CHECKED_ROWS = 512


@dataclass(slots=True)
class AttentionTap:
    """What one layer's attention function was given in the last run.

    Attributes
    ----------
    layer
        "model.layers.3.self_attn (LlamaAttention)", for messages.
    query
        (B, H, S, D), after rotary embedding and q/k norm.
    key
        (B, Hk, S, D); query head h reads key head h // (H // Hk).
    scale
        What the products of query and key are multiplied by.
    softcap
        Bound c of c * tanh(score / c), or None.
    window
        A query sees keys less than this many places before it, or None for all.
    mask
        As the function got it: None, (B, S), or (B or 1, 1, S, S) bool or additive.
    """

    layer: str
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None
    mask: Any = field(default=None, repr=False)

    def taken(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(query, key); ModelError where the layer did not run."""
        if self.query is None or self.key is None:
            raise ModelError(
                f"{self.layer}: expected its attention function to run under the tap, and it did"
                " not. Choose another layer, or load the model with attn_implementation='sdpa'."
            )
        return self.query, self.key

    def check_mask(self, segment: torch.Tensor) -> None:
        """Refuse a mask that causality, the window and `segment` do not describe.

        `segment` (B, S) int: tokens see each other where it is equal; -1 is padding. Only a
        mask given as a matrix can be compared, for flash attention never makes one.

        Raises ModelError naming the layer.
        """
        mask = self.mask
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
            return
        places = torch.arange(segment.shape[1], device=segment.device)
        for start in range(0, len(places), _CHECKED_ROWS):
            rows = slice(start, start + _CHECKED_ROWS)
            wanted = (places <= places[rows, None]) & (
                segment[:, rows, None] == segment[:, None, :]
            )
            if self.window is not None:
                wanted &= places > places[rows, None] - self.window
            real = segment[:, rows, None] >= 0
            if not torch.equal(_allowed(mask, rows) & real, wanted & real):
                raise ModelError(
                    f"{self.layer}: expected a causal mask with at most a sliding window, padding"
                    " and packed documents; the model made another one. Choose another layer."
                )

    def note(self, query: torch.Tensor, key: torch.Tensor, mask: Any, given: Any) -> None:
        """Keep what the attention function is given; refuse what the mass would not hold for."""
        for name, why in (("s_aux", "a learned attention sink"), ("position_bias", "a bias")):
            if given.get(name) is not None:
                raise ModelError(
                    f"{self.layer} adds {why} to its scores (`{name}`), which is not read here."
                    " Choose another layer or another model."
                )
        scale = given.get("scaling")
        self.query, self.key, self.mask = query.detach(), key.detach(), mask
        self.scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
        self.softcap = given.get("softcap")
        self.window = given.get("sliding_window")


def _allowed(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """(B or 1, rows, S) bool of a boolean or additive mask (B or 1, 1, S, S)."""
    part = mask[:, 0, rows]
    return part if part.dtype == torch.bool else part == 0


@contextmanager
def tap_attention(model: nn.Module, layer: int = -1) -> Iterator[AttentionTap]:
    """Note the queries and keys of one layer while the block runs; not for two threads at once.

    `layer` counts the decoder's layers from 0, or from the end where negative. The layer is put
    back as it was on leaving, after an exception too.

    Raises
    ------
    InputError
        There is no such layer.
    ModelError
        The layer looks up no attention function (state-space, linear attention, models of
        older make), or its code takes another way by the function's name.
    """
    name, module = attention_module(model, layer)
    with tap_module(name, module) as tap:
        yield tap


@contextmanager
def tap_module(name: str, module: Any) -> Iterator[AttentionTap]:
    """As `tap_attention`, of an attention module that is at hand; `name` is for messages.

    Raises ModelError where it looks up no attention function, or takes another way by its name.
    """
    code = _forward_of(module)
    if "ALL_ATTENTION_FUNCTIONS" not in code.__code__.co_names:
        raise ModelError(
            f"{name} ({type(module).__name__}): expected an attention that looks its function up"
            " in transformers' registry, and it does not. Ask for no attention signal of this"
            " model."
        )
    registry = code.__globals__["ALL_ATTENTION_FUNCTIONS"]
    config: Any = module.config
    own: Callable[..., Any] = registry.get_interface(
        config._attn_implementation, code.__globals__.get("eager_attention_forward")
    )
    tap = AttentionTap(f"{name} ({type(module).__name__})")
    _refuse_branches(tap.layer, module, code)
    private = copy.copy(config)
    private._attn_implementation_internal = f"prunery_tap_{id(tap)}"

    def tapped(
        called: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **given: Any,
    ) -> Any:
        tap.note(query, key, attention_mask, given)
        # Flash attention reads the name again, from the module.
        module.config = config
        try:
            return own(called, query, key, value, attention_mask, **given)
        finally:
            module.config = private

    registry[private._attn_implementation_internal] = tapped
    module.config = private
    try:
        yield tap
    finally:
        module.config = config
        del registry[private._attn_implementation_internal]


def attention_module(model: nn.Module, layer: int) -> tuple[str, Any]:
    """Name and module of a decoder layer's attention; see `tap_attention` for errors."""
    prefix, layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise InputError(
            f"expected a layer from {-len(layers)} to {len(layers) - 1}, for"
            f" {type(model).__name__} has {len(layers)}; found {layer}."
        )
    number = layer % len(layers)
    found = [
        (f"{prefix}.{number}.{name}", module)
        for name, module in layers[number].named_modules()
        if "ALL_ATTENTION_FUNCTIONS" in _forward_of(module).__code__.co_names
    ]
    kind = _kind_of(model, number)
    if len(found) != 1 or kind not in _CAUSAL_KINDS:
        inside = sorted({type(module).__name__ for module in layers[number].children()})
        raise ModelError(
            f"{prefix}.{number} ({', '.join(inside)}; {kind}): expected one causal softmax"
            " attention that looks its function up in transformers' registry; found"
            f" {len(found)} in a layer of that kind. Choose a layer with ordinary attention."
        )
    return found[0]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's decoder layers; ModelError where there is no such list."""
    whole: Any = model
    count = whole.config.get_text_config(decoder=True).num_hidden_layers
    inside = set((whole.get_decoder() if hasattr(model, "get_decoder") else whole).modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside:
            return name, module
    raise ModelError(
        f"{type(model).__name__}: expected a list of {count} decoder layers, found none. Ask for"
        " no attention signal of this model."
    )


def _kind_of(model: nn.Module, number: int) -> str:
    config: Any = model.config
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return str(kinds[number]) if kinds else "attention"


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _refuse_branches(layer: str, module: nn.Module, code: Any) -> None:
    """A forward that compares the function's name would take another way under the tap."""
    named = {"eager", "sdpa"} & {
        word
        for constant in code.__code__.co_consts
        for word in (constant if isinstance(constant, tuple) else (constant,))
        if isinstance(word, str)
    }
    # GPT-2 compares the name only for its own upcast attention.
    if named and getattr(module, "reorder_and_upcast_attn", True):
        raise ModelError(
            f"{layer} runs other code for attn_implementation {' or '.join(sorted(named))}, which"
            " a tap would change. Choose another layer; for GPT-2 set"
            " reorder_and_upcast_attn=False."
        )
