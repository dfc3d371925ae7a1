"""Which implementation runs, and the sentences that refuse one."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

IMPLS = ("auto", "reference", "torch", "triton")


def pick(impl: str, tensor: torch.Tensor) -> str:
    """Name of the implementation that `impl` means for tensors on `tensor`'s device.

    "auto" is Triton on CUDA where Triton is installed, and torch elsewhere.

    Raises
    ------
    InputError
        An unknown name, or "triton" for tensors that are not on a GPU.
    ImportError
        "triton" is asked for and not installed.
    """
    if impl not in IMPLS:
        raise InputError(f"impl is one of {', '.join(IMPLS)}; found {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and find_spec("triton") is not None else "torch"
    if impl == "triton":
        if find_spec("triton") is None:
            raise ImportError(
                "impl='triton' needs Triton, which is not installed: pip install"
                " 'prunery[triton]', or use impl='torch'"
            )
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(
                "impl='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 set before"
                f" the first import); found {tensor.device}. Use impl='torch' there"
            )
    return impl


def check(holds: bool, message: str) -> None:
    """Raise InputError with `message` unless `holds`."""
    if not holds:
        raise InputError(message)


def check_positive(name: str, value: float | None) -> None:
    """Refuse a number that is not finite and above 0; None passes."""
    if value is not None and not 0.0 < value < float("inf"):
        raise InputError(f"{name} is a finite number above 0, or left out; found {value}")
