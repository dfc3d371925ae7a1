"""Where a model runs unless it is told."""

from __future__ import annotations


def pick_device(device: str | None) -> str:
    """ "auto" or None to "cuda" where there is one, else "cpu"; other names as they are."""
    if device not in (None, "auto"):
        return str(device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
