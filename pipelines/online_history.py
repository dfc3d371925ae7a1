"""The earlier self of a model in training: the weights that its progress is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ModelError

_SAMPLED = 64  # numbers of each tensor that enter a fingerprint


class History:
    """A second set of the trained weights of one model, put in their place while it scores.

    Frozen weights are shared, so with adapters the copy is as small as they are, and no second
    model is ever built. Buffers are not copied: the causal models here have none that learn.

    Parameters
    ----------
    model
        The model in training; its weights now are the first history.
    kind
        "base" = those weights, replaced by the present ones every `refresh` steps where that is
        given; "ema" = their exponential moving average.
    decay
        Of the average: history = decay * history + (1 - decay) * now.
    """

    def __init__(
        self, model: nn.Module, kind: Literal["base", "ema"], *, decay: float, refresh: int | None
    ) -> None:
        self.kind = kind
        self.decay = decay
        self.refresh = refresh
        self.step = 0
        self._model: Any = model
        # With adapters the base needs no copy: it is the model without them.
        self._adapters_off = (
            kind == "base" and refresh is None and hasattr(model, "disable_adapter")
        )
        self.base = ""
        self._weights: dict[str, torch.Tensor] = {}
        self._take()

    def _take(self) -> None:
        # A history that moves is saved whole; one that does not must begin the same on resuming.
        if not self.moves:
            self.base = fingerprint(self._model, frozen=self._adapters_off)
        if not self._adapters_off:
            # A slow average moves by less than half precision can hold.
            wide = torch.float32 if self.kind == "ema" else None
            self._weights = {
                name: one.detach().clone().to(wide or one.dtype) for name, one in self._trained()
            }

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def restart(self) -> None:
        """Begin again from the present weights, where training does."""
        if self.step > 0:
            self.step = 0
            self._take()

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Take in the weights after optimiser step `step`; a second call changes nothing."""
        if step <= self.step:
            return
        self.step = step
        for name, parameter in self._trained():
            if self.kind == "ema":
                self._weights[name].lerp_(parameter.float(), 1.0 - self.decay)
            elif self.refresh is not None and step % self.refresh == 0:
                self._weights[name].copy_(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes as its earlier self; no graph may cross the border."""
        if self._adapters_off:
            with self._model.disable_adapter():
                yield
            return
        now = {name: parameter.data for name, parameter in self._trained()}
        try:
            for name, parameter in self._trained():
                parameter.data = self._weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._trained():
                parameter.data = now[name]

    @property
    def moves(self) -> bool:
        """Does it change in training, so that it must be saved?"""
        return self.kind == "ema" or self.refresh is not None

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_file({name: one.contiguous() for name, one in self._weights.items()}, str(path))

    def load(self, path: Path, step: int) -> None:
        """Read what `save` wrote after optimiser step `step`.

        Raises
        ------
        ModelError
            The file is missing, or its tensors are not those of the model's trained weights.
        """
        if not path.is_file():
            raise ModelError(
                f"{path} is missing: the checkpoint does not hold the history weights. Resume"
                " from a checkpoint that was written with the same selection."
            )
        found = load_file(str(path))
        differ = sorted(found.keys() ^ self._weights.keys())
        if differ:
            raise ModelError(
                f"{path}: expected the {len(self._weights)} trained weights of the model; the"
                f" names differ, first `{differ[0]}`. Resume with the same model and adapters."
            )
        for name, one in found.items():
            self._weights[name].copy_(one)
        self.step = step


@torch.no_grad()
def fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """Digest of the names, shapes and 64 evenly spaced numbers of every weight of a model.

    With `frozen`, of the weights that are not trained. Tells another base model from the same
    one in milliseconds; no guard against tampering.
    """
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if frozen and parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        stride = max(1, len(flat) // _SAMPLED)
        sha.update(f"{name}{tuple(parameter.shape)}".encode())
        sha.update(flat[::stride].float().cpu().numpy().tobytes())
    return sha.hexdigest()
