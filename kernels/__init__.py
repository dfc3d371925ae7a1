"""Arithmetic: reference, torch and Triton implementations behind one name each.

The names below are loaded when they are first used, and an implementation by its first call, so
that importing this package loads neither torch nor Triton. No module here bears the name of one
of them: importing it would put the module in the function's place (hence `hadamard` and
`sparse24` are taken from their own modules). And nothing is imported
here from above: where the repository root is on the path, transformers finds this folder when
it looks for a distribution called `kernels`, and must see that this is none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import AttentionMass, attention_mass
    from .centers import KCenterStep, k_center_step
    from .gated_mlp import sparse_gated_mlp
    from .hadamard import block_of, hadamard_matrix
    from .int4 import Int4Library, int4_matmul, pack_int4, prepare_int4, unpack_int4
    from .nearest import pairwise_topk
    from .sparse24 import Gate24, Sparse24, check_24, sparse24_linear
    from .tokens import TokenStats, token_stats
    from .wanda import column_square_sums, pack_mask, unpack_mask, wanda_mask

__all__ = [
    "AttentionMass",
    "Gate24",
    "Int4Library",
    "KCenterStep",
    "Sparse24",
    "TokenStats",
    "attention_mass",
    "block_of",
    "check_24",
    "column_square_sums",
    "hadamard_matrix",
    "int4_matmul",
    "k_center_step",
    "pack_int4",
    "pack_mask",
    "pairwise_topk",
    "prepare_int4",
    "sparse24_linear",
    "sparse_gated_mlp",
    "token_stats",
    "unpack_int4",
    "unpack_mask",
    "wanda_mask",
]

_HOME = {
    "AttentionMass": ".attention",
    "Gate24": ".sparse24",
    "Int4Library": ".int4",
    "KCenterStep": ".centers",
    "Sparse24": ".sparse24",
    "TokenStats": ".tokens",
    "attention_mass": ".attention",
    "block_of": ".hadamard",
    "check_24": ".sparse24",
    "column_square_sums": ".wanda",
    "hadamard_matrix": ".hadamard",
    "int4_matmul": ".int4",
    "k_center_step": ".centers",
    "pack_int4": ".int4",
    "pack_mask": ".wanda",
    "pairwise_topk": ".nearest",
    "prepare_int4": ".int4",
    "sparse24_linear": ".sparse24",
    "sparse_gated_mlp": ".gated_mlp",
    "token_stats": ".tokens",
    "unpack_int4": ".int4",
    "unpack_mask": ".wanda",
    "wanda_mask": ".wanda",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
