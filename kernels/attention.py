"""Attention that queries give to chosen keys, and that keys receive from chosen queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dispatch import check, check_positive, pick

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionMass:
    """Sums over the attention matrix A (B, H, Q, K), whose rows sum to 1.

    Attributes
    ----------
    row
        (B, H, Q) float32 in [0, 1], sum of A over the key columns asked for; 0 for a query that
        was not asked for or sees no key.
    column
        (B, H, K) float32, sum of A over the query rows asked for; None where it was left out.
    """

    row: torch.Tensor
    column: torch.Tensor | None


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    query_rows: torch.Tensor | None = None,
    key_columns: torch.Tensor | None = None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    query_segment: torch.Tensor | None = None,
    key_segment: torch.Tensor | None = None,
    columns: bool = True,
    impl: str = "auto",
) -> AttentionMass:
    """Row and column sums of softmax(scale * query @ key.T), never holding queries x keys.

    row[i] = exp(LSE over the chosen keys - LSE over all keys), the attention mass of ssToken
    (arXiv:2510.18250) when the chosen keys are the prompt's; column[j] is what H2O
    (arXiv:2306.14048) and FastV (arXiv:2403.06764) sum. Query i stands at position
    i + K - Q, as the last Q of K tokens do. Take query and key after rotary embedding and
    q/k norms. float32 arithmetic whatever the inputs are (float64 for "reference"); no gradient.

    Parameters
    ----------
    query
        (B, H, Q, D) floating.
    key
        (B, Hk, K, D) floating; Hk divides H, and head h reads key head h // (H // Hk).
    query_rows
        (B, Q) bool, the queries to sum over and to give a row for; None = all. The others cost
        nothing.
    key_columns
        (B, K) bool, the keys whose mass `row` is; None = all.
    scale
        Factor on the products, as the model has it (often D ** -0.5).
    causal
        A query sees keys at its own position and before.
    window
        A query sees keys less than `window` positions before its own (its own is the first),
        and, without `causal`, any after it.
    softcap
        Logits become softcap * tanh(logits / softcap), before the mask, as in Gemma 2.
    query_segment, key_segment
        (B, Q) and (B, K) int, given together: a query sees the keys of its own segment;
        a negative one (padding) sees nothing and is not seen.
    columns
        Whether to make `column`, which takes a further pass.
    impl
        As for `token_stats`. "torch" holds the logits of a block of queries with the keys that
        they may see: 16 MiB on a CPU, 64 MiB on a GPU, or one query of each head that shares
        the key head where that is more. "triton" holds no logits outside a tile.

    Raises
    ------
    InputError
        Shapes, dtypes or devices that do not fit, an option out of range.
    ImportError
        impl="triton" without Triton.
    """
    chosen = pick(impl, query)
    _check(query, key)
    batch, (rows, keys) = query.shape[0], (query.shape[2], key.shape[2])
    check_positive("scale", scale)
    check_positive("softcap", softcap)
    check(window is None or window >= 1, f"window is at least 1, or None; found {window}")
    for name, mask, width in (("query_rows", query_rows, rows), ("key_columns", key_columns, keys)):
        _check_side(name, mask, (batch, width), query, integers=False)
    check(
        (query_segment is None) == (key_segment is None),
        "query_segment and key_segment are given together; found one of them",
    )
    _check_side("query_segment", query_segment, (batch, rows), query, integers=True)
    _check_side("key_segment", key_segment, (batch, keys), query, integers=True)
    from .attention_reference import Sight, reference
    from .attention_torch import blocked

    sight = Sight(rows, keys, causal, window, query_segment, key_segment)
    if chosen == "triton":
        from .attention_triton import two_kernels

        run = two_kernels
    else:
        run = reference if chosen == "reference" else blocked
    row, column = run(query, key, query_rows, key_columns, scale, softcap, sight, columns)
    return AttentionMass(row, column)


def _check(query: torch.Tensor, key: torch.Tensor) -> None:
    check(
        query.dim() == 4
        and key.dim() == 4
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0,
        "query is (B, H, Q, D) and key (B, Hk, K, D), Hk a divisor of H;"
        f" found {tuple(query.shape)} and {tuple(key.shape)}",
    )
    for name, tensor in (("query", query), ("key", key)):
        check(tensor.is_floating_point(), f"{name} is of a floating dtype; found {tensor.dtype}")
    check(
        query.device == key.device,
        f"query and key are on one device; found {query.device} and {key.device}",
    )


def _check_side(
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int, int],
    query: torch.Tensor,
    *,
    integers: bool,
) -> None:
    import torch

    if tensor is None:
        return
    dtypes = (torch.int32, torch.int64) if integers else (torch.bool,)
    kind = "int32 or int64" if integers else "bool"
    check(
        tuple(tensor.shape) == shape and tensor.dtype in dtypes and tensor.device == query.device,
        f"{name} is {shape} {kind} on {query.device};"
        f" found {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}",
    )
