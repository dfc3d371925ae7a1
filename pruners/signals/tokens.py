"""What a causal language model says about the tokens it is trained on.

One run of the decoder gives, for each target token: its loss, the entropy of the distribution it
was drawn from, the log of that distribution's normaliser, the target's rank, and how much the
token attends to the prompt. Logits of tokens by vocabulary are never held, and the output layer
runs only where there is a target.

The target at place p is predicted from the hidden state at p - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...errors import InputError, ModelError
from ...kernels import attention_mass, token_stats
from .attention_tap import AttentionTap, tap_attention

_READ: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAttention:
    """Ask for the attention that each target pays to the prompt.

    Attributes
    ----------
    layer
        Decoder layer, from 0, or from the end where negative; ssToken uses the last.
    exclude_sink
        The first so many tokens of a sequence, which draw attention whatever they say, do not
        count as prompt. 0 as published.
    """

    layer: int = -1
    exclude_sink: int = 0


@dataclass(frozen=True, slots=True)
class TokenScores:
    """T targets in order of row, then position. Tensors on the model's device.

    Attributes
    ----------
    row, position
        (T,) int64, where each target stands in the input.
    loss
        (T,) float32, nats; -log p(target | tokens before it). Not finite where the model's
        numbers are not: the caller decides.
    entropy
        (T,) float32, nats, of the whole distribution at the target.
    log_sum_exp
        (T,) float32, nats.
    target_rank
        (T,) int64, vocabulary entries whose logit is strictly higher; None unless asked for.
    prompt_attention
        (T,) float32 in [0, 1]; None unless asked for.
    """

    row: torch.Tensor
    position: torch.Tensor
    loss: torch.Tensor
    entropy: torch.Tensor
    log_sum_exp: torch.Tensor
    target_rank: torch.Tensor | None = None
    prompt_attention: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: logits = softcap(scale * (hidden @ weight.T + bias))."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs of the decoder, and what the targets and documents are; all (B, S)."""

    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    segment: torch.Tensor  # number of the document in its row, -1 for padding


def score_tokens(
    model: Any,
    input_ids: torch.Tensor,
    trainable: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    rank: bool = False,
    attention: PromptAttention | None = None,
    impl: str = "auto",
) -> TokenScores:
    """Loss, entropy and more of each target token, from one run without gradients.

    The model is scored in eval mode and every module is put back into the mode it was in.
    `torch.no_grad` and not inference mode, which would leave behind buffers (of rotary
    embeddings) that training cannot use.

    Parameters
    ----------
    model
        A causal language model of transformers with a linear output layer, or one with LoRA
        adapters of PEFT.
    input_ids
        (B, S) int64.
    trainable
        (B, S) bool, the targets. Never the first token of a row or of a packed document, and
        never padding.
    attention_mask
        (B, S), 1 where there is a token; padding on either side. None = no padding. Where
        padding is on the left and no positions are given, each row's positions start at its
        first token.
    position_ids
        (B, S) int64. Where they start again from 0 within a row, the row holds packed
        documents that do not see each other.
    rank
        Compute the targets' ranks too.
    attention
        Compute the targets' attention on the prompt too (ssToken, arXiv 2510.18250): at the
        token's own query, the softmax mass on earlier tokens that are not targets, mean over
        heads, one layer. With several turns those are the tokens of every earlier turn that is
        not trained, where the published code takes one prompt at the start. Not normalised.
    impl
        Of the kernels: auto, torch, triton or reference.

    Raises
    ------
    InputError
        Shapes differ, an id is outside the vocabulary, or a target stands where nothing
        predicts it.
    ModelError
        The output layer, or the layer asked for, is of a kind that cannot be read.
    """
    batch = _checked(model, input_ids, trainable, attention_mask, position_ids)
    row, position = batch.targets.nonzero(as_tuple=True)
    decoder = decoder_of(model)
    with _scoring(model):
        head = read_head(model)
        tapping = nullcontext(None) if attention is None else tap_attention(model, attention.layer)
        with tapping as tap:
            hidden = _run(decoder, batch.ids, batch.mask, batch.positions)
            hidden = hidden[row, position - 1]
        stats = token_stats(
            hidden,
            head.weight,
            batch.ids[row, position],
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
            rank=rank,
            impl=impl,
        )
        mass = None
        if tap is not None and attention is not None:
            mass = _prompt_mass(tap, batch, attention.exclude_sink, impl)[row, position]
    # Both are at least 0; float32 can miss that by its last bits.
    loss, entropy = stats.nll.clamp(min=0), stats.entropy.clamp(min=0)
    return TokenScores(row, position, loss, entropy, stats.lse, stats.rank, mass)


def answer_alone(
    input_ids: npt.NDArray[np.integer[Any]],
    trainable: npt.NDArray[np.bool_],
    turn: npt.NDArray[np.integer[Any]],
    start: int,
) -> list[npt.NDArray[np.int64]]:
    """A sample's answers without what they answer, for IFD (arXiv 2308.12032).

    Each turn's targets (L,) follow the token `start` (the tokenizer's begin-of-sequence, or its
    end-of-sequence where it has none), so all T targets are predicted; in each sequence made,
    every token but the first is a target. The published code has one turn; here each answer
    stands alone, without the answers before it.
    """
    places = np.flatnonzero(trainable)
    borders = np.flatnonzero(np.diff(turn[places])) + 1
    return [
        np.concatenate([[start], input_ids[part]]).astype(np.int64)
        for part in np.split(places, borders)
        if len(part)
    ]


def decoder_of(model: Any) -> nn.Module:
    """The network below the output layer; ModelError where the model has none."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(found, nn.Module) or found is model or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__}: expected a causal language model (a decoder below a linear"
            " output layer). Load it with AutoModelForCausalLM."
        )
    return found


def read_head(model: Any) -> Head:
    """The model's output layer, read; once a model it is held against what the model does.

    Reads the softcap of Gemma (`final_logit_softcapping`), the scale of Cohere (`logit_scale`)
    and of Falcon-H1 (`lm_head_multiplier`), and the divisor of Granite (`logits_scaling`).

    Raises ModelError where the layer is not linear, or where the model does more around it than
    is read here.
    """
    layer = _output_layer(model)
    weight = getattr(layer, "weight", None)
    if (
        not isinstance(layer, nn.Linear)
        or type(layer).forward is not nn.Linear.forward
        or not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.shape != (layer.out_features, layer.in_features)
    ):
        raise ModelError(
            f"{type(model).__name__}: expected a linear output layer with its whole weight in"
            f" floating point; found {type(layer).__name__}. Merge adapters on the output layer,"
            " and load it unquantised and unsharded."
        )
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(weight, layer.bias, getattr(config, "final_logit_softcapping", None), scale)
    if model not in _READ:
        _hold_against_logits(model, layer, head)
        _READ[model] = True
    return head


def _output_layer(model: Any) -> Any:
    read = getattr(model, "get_output_embeddings", None)
    layer: Any = read() if read is not None else None
    if not hasattr(layer, "modules_to_save"):
        return layer
    # PEFT keeps the copy of a layer that is trained whole beside the original.
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return layer.modules_to_save[layer.active_adapters[0]]


def _hold_against_logits(model: Any, layer: nn.Linear, head: Head) -> None:
    """Run two tokens: what enters the layer, and what becomes of what leaves it."""
    seen: dict[str, torch.Tensor] = {}

    def of_decoder(_: nn.Module, given: Any, made: Any) -> None:
        seen["hidden"] = made.last_hidden_state

    def of_layer(_: nn.Module, given: Any, made: torch.Tensor) -> None:
        seen["entered"], seen["left"] = given[0], made

    hooks = [
        decoder_of(model).register_forward_hook(of_decoder),
        layer.register_forward_hook(of_layer),
    ]
    try:
        ids = torch.arange(2, device=head.weight.device)[None] % head.weight.shape[0]
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if {"hidden", "entered"} <= set(seen) and logits is not None:
        made = seen["left"].float() * head.scale
        if head.softcap is not None:
            made = head.softcap * torch.tanh(made / head.softcap)
        if _same(seen["hidden"], seen["entered"], 0.0) and _same(logits, made, 0.01):
            return
    raise ModelError(
        f"{type(model).__name__}: expected its logits to be those of its linear output layer"
        " with a scale and a softcap; the model computes others. This head cannot be read."
    )


def _same(found: torch.Tensor, wanted: torch.Tensor, room: float) -> bool:
    """Equal within `room` of the largest value (steps of half precision); NaN equals NaN."""
    found, wanted = found.float(), wanted.float()
    most = float(wanted.abs().nan_to_num(0, 0, 0).max())
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=0, atol=room * most, equal_nan=True
    )


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _run(
    decoder: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """Last hidden states (B, S, d), after the final norm."""
    given = {} if positions is None else {"position_ids": positions}
    made = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **given)
    hidden: torch.Tensor = made.last_hidden_state
    return hidden


def _checked(
    model: Any,
    input_ids: torch.Tensor,
    trainable: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> _Batch:
    """The inputs on the model's device, in the form in which the decoder is right about them."""
    device = model.get_input_embeddings().weight.device
    ids = input_ids.to(device)
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InputError(
            f"expected `input_ids` (B, S) int64; found {tuple(ids.shape)} {ids.dtype}."
        )
    _refuse_ids(model, ids)
    targets = _like(ids, trainable, "trainable").bool()
    real = torch.ones_like(targets)
    if attention_mask is not None:
        real = _like(ids, attention_mask, "attention_mask").bool()
    positions = None if position_ids is None else _like(ids, position_ids, "position_ids")
    starts = _starts(real, positions)
    _refuse_targets(targets, real, starts)
    segment = torch.where(real, starts.cumsum(1), -1)
    mask: torch.Tensor | None = real.long()
    if bool((real[:, 1:] <= real[:, :-1]).all()) and (not _flash(model) or bool(real.all())):
        mask = None  # no token looks at the padding behind it, and SDPA is faster without
    if bool((starts.sum(1) > 1).any()):
        # Transformers keeps packed documents apart only where no mask is given; each token of
        # padding then is a document of its own.
        positions = torch.where(real, positions, 0) if positions is not None else None
        mask = None
        _refuse_packed(model, len(ids))
    elif positions is None and not bool(real[:, :1].all()):
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return _Batch(ids, targets, mask, positions, segment)


def _starts(real: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(B, S) bool: the first token of each document."""
    starts = real & (real.long().cumsum(1) == 1)
    if positions is not None:
        jump = torch.zeros_like(real)
        jump[:, 1:] = positions[:, 1:] - positions[:, :-1] != 1
        starts |= real & jump
    return starts


def _like(ids: torch.Tensor, given: torch.Tensor, name: str) -> torch.Tensor:
    if given.shape != ids.shape:
        raise InputError(
            f"expected `{name}` {tuple(ids.shape)} like `input_ids`; found {tuple(given.shape)}."
        )
    return given.to(ids.device)


def _refuse_ids(model: Any, ids: torch.Tensor) -> None:
    size = int(model.get_input_embeddings().weight.shape[0])
    bad = ((ids < 0) | (ids >= size)).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        raise InputError(
            f"expected ids from 0 to {size - 1}, the vocabulary of {type(model).__name__}; found"
            f" {int(ids[row, place])} at row {row}, position {place}. Tokenise with this model's"
            " tokenizer."
        )


def _refuse_targets(targets: torch.Tensor, real: torch.Tensor, starts: torch.Tensor) -> None:
    for where, what in ((~real, "padding"), (starts, "the first token of a sequence")):
        bad = (targets & where).nonzero()
        if len(bad):
            row, place = bad[0].tolist()
            raise InputError(
                f"expected targets that a token of the same sequence stands before; row {row},"
                f" position {place} is {what}. Clear `trainable` there."
            )


def _refuse_packed(model: Any, rows: int) -> None:
    if rows > 1 and _flash(model):
        raise InputError(
            f"expected one row of packed documents with flash attention; found {rows}, which it"
            " would not keep apart. Give one row at a time."
        )


def _flash(model: Any) -> bool:
    return "flash" in (model.config._attn_implementation or "")


def _prompt_mass(tap: AttentionTap, batch: _Batch, exclude_sink: int, impl: str) -> torch.Tensor:
    """(B, S) float32: attention of each target's own query on the prompt, mean over heads."""
    query, key = tap.taken()
    tap.check_mask(batch.segment)
    made = attention_mass(
        query,
        key,
        query_rows=batch.targets,
        key_columns=~batch.targets & (_place(batch.segment) >= exclude_sink),
        scale=tap.scale,
        causal=True,
        window=tap.window,
        softcap=tap.softcap,
        query_segment=batch.segment,
        key_segment=batch.segment,
        columns=False,
        impl=impl,
    )
    return made.row.mean(1)


def _place(segment: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: place of each token in its document, from 0."""
    places = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values
