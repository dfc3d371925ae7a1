"""Loss, entropy, log-sum-exp and rank of next-token predictions, without their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dispatch import check, check_positive, pick

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenStats:
    """What a language model's head says of each target, in the shape of `targets`.

    Ignored targets have 0 everywhere.

    Attributes
    ----------
    nll
        float32, -log p(target) in nats; inf where the target's logit is -inf.
    entropy
        float32, -sum p log p over the whole vocabulary in nats; an entry of probability 0
        adds 0.
    lse
        float32, log-sum-exp of the logits, in nats.
    rank
        int64, number of vocabulary entries whose logit is strictly greater than the target's
        (0 = the target is a most likely token), or None where it was not asked for. Means
        nothing where `nll` is NaN.
    """

    nll: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    rank: torch.Tensor | None


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    rank: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """Statistics of softmax(logits) at each target, never holding tokens x vocabulary.

    logits = scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap). In
    transformers' models that is: a plain linear head (scale 1), Cohere's `logit_scale` (scale =
    logit_scale), Granite's `logits_scaling`, which divides (scale = 1 / logits_scaling), and
    Gemma's `final_logit_softcapping` (softcap).

    The arithmetic is float32 whatever the inputs are (float64 for "reference"): half-precision
    inputs are multiplied exactly and the logits never rounded to 8 or 11 bits, so the loss is
    nearer to the truth than that of logits stored in the model's dtype. No gradient is kept,
    and autocast is off inside. A NaN or +inf logit makes its own row NaN and no other.

    From the identity H = lse - sum p z (as in Liger-Kernel's and cut-cross-entropy's losses,
    Wijmans et al. 2024, arXiv:2411.09009; theirs give gradients too, and the latter no
    entropy).

    Parameters
    ----------
    hidden
        (..., d) floating, last hidden states at the positions that predict the targets.
    weight
        (V, d) floating, the head.
    targets
        (...) int64 in [0, V), or `ignore_index` for a row to leave out; those cost nothing.
    bias
        (V,) floating or None; -inf bans an entry.
    softcap, scale
        Finite and above 0.
    rank
        Whether to count the entries above the target. They are compared with the target's
        logit in one and the same product: the target never counts, nor do equal logits (but
        rounding may part two entries whose logits are equal on paper).
    impl
        "reference": by the definition, in float64, all logits at once. "torch": rows and
        vocabulary in tiles of a few MiB. "triton": one kernel, deterministic, no atomics.
        "auto": Triton on CUDA, torch elsewhere.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, a target outside the vocabulary (on every
        device: on a GPU the check waits for it once), an option out of range.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, hidden)
    _check(hidden, weight, targets, bias)
    check_positive("softcap", softcap)
    check_positive("scale", scale)
    from .tokens_reference import reference
    from .tokens_torch import tiled

    flat = targets.reshape(-1)
    rows = (flat != ignore_index).nonzero().squeeze(1)
    wanted = flat[rows]
    _check_range(wanted, rows, len(weight))
    states = hidden.reshape(-1, hidden.shape[-1])
    if chosen == "triton":
        from .tokens_triton import fused

        run = fused
    else:
        run = reference if chosen == "reference" else tiled
    found = run(states, weight, rows, wanted, bias, softcap, scale, rank)
    nll, entropy, lse = (_spread(one, rows, targets) for one in found[:3])
    return TokenStats(nll, entropy, lse, _spread(found[3], rows, targets) if rank else None)


def _spread(values: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`values` at `rows`, 0 elsewhere, in the shape of `targets`."""
    return values.new_zeros(targets.numel()).index_copy_(0, rows, values).reshape(targets.shape)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> None:
    import torch

    check(
        weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1],
        "hidden is (..., d) and weight (V, d);"
        f" found {tuple(hidden.shape)} and {tuple(weight.shape)}",
    )
    check(
        hidden.shape[:-1] == targets.shape,
        f"targets has the shape of hidden without its last axis, {tuple(hidden.shape[:-1])};"
        f" found {tuple(targets.shape)}",
    )
    check(targets.dtype == torch.int64, f"targets is int64; found {targets.dtype}")
    check(len(weight) > 0, "weight has at least one row; found none")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check(tensor.is_floating_point(), f"{name} is of a floating dtype; found {tensor.dtype}")
    if bias is not None:
        check(
            bias.shape == weight.shape[:1],
            f"bias is (V,) = ({len(weight)},); found {tuple(bias.shape)}",
        )
    devices = {one.device for one in (hidden, weight, targets, bias) if one is not None}
    check(
        len(devices) == 1,
        "hidden, weight, targets and bias are on one device; found"
        f" {', '.join(sorted(map(str, devices)))}",
    )


def _check_range(wanted: torch.Tensor, rows: torch.Tensor, vocabulary: int) -> None:
    bad = (wanted < 0) | (wanted >= vocabulary)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        check(
            False,
            f"targets are in [0, {vocabulary}) or ignore_index; found {int(wanted[first])} at"
            f" place {int(rows[first])} of the flattened targets. Is the tokenizer the model's?",
        )
