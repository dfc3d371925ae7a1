"""A gated MLP that reads `up` and `down` for live neurons alone: decoding one or few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .dispatch import check, pick

if TYPE_CHECKING:
    import torch

MOST_ROWS = 4
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def sparse_gated_mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    activation: str = "silu",
    rule: Literal["gate", "product"] = "gate",
    impl: str = "auto",
) -> torch.Tensor:
    """down(h) of h = live * act(gate x) * (up x), which leaves dead neurons' weights unread.

    rule "gate": a neuron lives where |act(gate x)| > threshold (CATS, arXiv:2404.08763, and with
    a threshold a neuron CHESS, arXiv:2409.01366); `up` and `down` are read for live neurons.
    rule "product": where |act(gate x) * (up x)| > threshold; `down` alone is read sparsely. CATS
    and CHESS keep a value equal to the threshold, this does not. A NaN is alive, so that it is
    seen in the result.

    The result is that of the dense product with h masked: where too many neurons live, or x has
    more than 4 rows, it is computed in that way. On a CPU the share from which on was measured
    (`gated_mlp_torch.DENSE_SHARE`); on a GPU the share is not asked for, since that would wait
    for the device, and dead rows are skipped by masked loads. A neuron that lives for one row of
    x is read for all of them. Sums are float32, in a fixed order.

    Parameters
    ----------
    x
        (B, d) floating.
    gate, up
        (n, d), in the dtype of x.
    down_t
        (n, d_out), the transpose of the down projection's weight, so that a neuron's weights lie
        together: `down.weight.T.contiguous()`.
    threshold
        At least 0; a number, or (n,) floating, one for each neuron.
    activation
        "silu", "gelu" (by erf), "gelu_tanh" or "relu".
    impl
        "reference": float64, all of it. "torch": rows of live neurons gathered a few at a time.
        "triton": two kernels, partial sums and no atomics. "auto": Triton on CUDA, torch
        elsewhere.

    Returns
    -------
    (B, d_out) in the dtype of x.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, a negative or NaN threshold, an unknown
        activation or rule.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, x)
    _check(x, gate, up, down_t)
    limit = _threshold(threshold, x, len(gate))
    check(
        activation in ACTIVATIONS,
        f"activation is one of {', '.join(ACTIVATIONS)}; found {activation!r}",
    )
    check(rule in ("gate", "product"), f"rule is gate or product; found {rule!r}")
    if chosen == "triton":
        from .gated_mlp_triton import masked as run
    elif chosen == "torch":
        from .gated_mlp_torch import gathered as run
    else:
        from .gated_mlp_torch import reference as run
    return run(x, gate, up, down_t, limit, activation, rule == "product")


def _threshold(threshold: float | torch.Tensor, x: torch.Tensor, neurons: int) -> torch.Tensor:
    """(n,) float32 on the device of x."""
    import torch

    if not isinstance(threshold, torch.Tensor):
        check(threshold >= 0, f"threshold is at least 0; found {threshold}")
        return torch.full((neurons,), float(threshold), device=x.device)
    check(
        threshold.shape == (neurons,)
        and threshold.is_floating_point()
        and threshold.device == x.device,
        f"threshold is a number or ({neurons},) floating on {x.device}; found"
        f" {tuple(threshold.shape)} {threshold.dtype} on {threshold.device}",
    )
    if not x.is_cuda:  # on a GPU the check would wait for it at every token
        bad = ~(threshold >= 0)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            check(
                False,
                f"threshold is at least 0; found {float(threshold[first])} at neuron {first}",
            )
    return threshold.float()


def _check(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor) -> None:
    check(
        x.dim() == gate.dim() == up.dim() == down_t.dim() == 2
        and gate.shape == up.shape
        and gate.shape[1] == x.shape[1]
        and len(down_t) == len(gate),
        "x is (B, d), gate and up (n, d), down_t (n, d_out); found"
        f" {', '.join(str(tuple(one.shape)) for one in (x, gate, up, down_t))}. Is down"
        " transposed?",
    )
    check(x.is_floating_point(), f"x is of a floating dtype; found {x.dtype}")
    for name, tensor in (("gate", gate), ("up", up), ("down_t", down_t)):
        check(
            tensor.dtype == x.dtype and tensor.device == x.device,
            f"{name} is {x.dtype} on {x.device}, as x is; found {tensor.dtype} on {tensor.device}",
        )
