"""Gradients of the loss with respect to a model's matrices, one block in memory at a time.

A pass forward keeps what every block takes on disk; a pass back, from the last block to the
first, builds the graph of one block alone. The disk holds layers x tokens x hidden numbers until
the blocks above are done with them. Each row of calibration text is a batch of its own, for
gradients of rows are looked at one by one (GBLM, arXiv:2311.04902; LLM-Pruner, arXiv:2305.11627).

The loss of a row is the mean cross-entropy of its next tokens, in nats. By the matrix's own path:
"gradient" (out, in) float32, sum over rows of g; "gradient_square", of g²; "gradient_abs", of
|g|; "gradient_rows" () int64, how many rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...errors import InputError, ModelError
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.signals.block_statistics import GRADIENT_STATISTICS
from .journal import LayerJournal
from .statistics import keyed, named
from .walk import Batch, batches_of

_POWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda gradient: gradient,
    "gradient_square": torch.square,
    "gradient_abs": torch.abs,
}


class GradientPass:
    """Gradients of all layers, made once; killed at any layer, it goes on with the same bytes.

    Parameters
    ----------
    model
        A causal language model.
    rows
        Token ids of each row, (L,) with L >= 2.
    folder
        Where unfinished layers lie; its own.
    wanted
        Names among GRADIENT_STATISTICS.

    Raises
    ------
    InputError
        A masked language model, which has no next token.
    """

    def __init__(
        self,
        model: StreamedModel,
        rows: Sequence[npt.NDArray[np.integer[Any]]],
        folder: Path,
        wanted: frozenset[str],
    ) -> None:
        if model.layout.head != "causal":
            raise InputError(
                f"{model.folder}: expected a causal language model for gradients of the next"
                " token's loss; found a masked one. Leave the gradient statistics out."
            )
        self.model = model
        self.names = sorted(wanted & GRADIENT_STATISTICS)
        self.batches = batches_of(rows, tokens=1)
        self.folder = folder
        self._open()

    def run(self, each_layer: Callable[[int], None] | None = None) -> None:
        """Make all layers that are not done, from the last to the first."""
        done = self._standing()
        if done == self.model.layers:
            return
        if done == 0:
            self._forward()
            self._top()
        for step in range(done, self.model.layers):
            layer = self.model.layers - 1 - step
            self._back.record(step, self._block(step, layer))
            self._inputs.forget(layer + 1)
            if each_layer is not None:
                each_layer(layer)

    def layer(self, number: int) -> dict[tuple[str, str], Tensor]:
        """Statistics of one layer, by (module, statistic), once it is done."""
        return keyed(self._back.tensors(self.model.layers - 1 - number))

    # -- the passes ----------------------------------------------------------------------------

    def _open(self) -> None:
        self._inputs = _Inputs(self.folder / "forward")
        self._back = LayerJournal(self.folder / "backward")

    def _standing(self) -> int:
        """Layers that are done; 0 and an empty folder where what they hand on was lost."""
        done, count = self._back.done(), len(self.batches)
        below = range(self.model.layers - done)
        whole = self._back.has_hidden(done, count) and all(
            self._inputs.has_hidden(layer, count) for layer in below
        )
        if done == self.model.layers or (done and whole):
            return done
        if done:
            shutil.rmtree(self.folder)
            self._open()
        return 0

    def _forward(self) -> None:
        """Keep what every block takes, and what the last one gives."""
        count = len(self.batches)
        if not self._inputs.has_hidden(0, count):
            for number, batch in enumerate(self.batches):
                hidden = self.model.prepare(batch.input_ids, batch.valid).hidden
                self._inputs.put_hidden(0, number, hidden)
        for layer in range(self.model.layers):
            if self._inputs.has_hidden(layer + 1, count):
                continue
            block = self.model.block(layer)
            for number, batch in enumerate(self.batches):
                with torch.no_grad():
                    out = self.model.run(
                        block, self._hidden(layer, number), self._call(batch, layer)
                    )
                _finite(out, layer, batch, "outputs")
                self._inputs.put_hidden(layer + 1, number, out)

    def _top(self) -> None:
        """The gradient of each row's loss by what the last block gives."""
        last = self.model.layers
        for number, batch in enumerate(self.batches):
            hidden = self._hidden(last, number).requires_grad_(True)
            logits = self.model.logits(hidden, batch.input_ids, batch.valid)[0, :-1].float()
            target = batch.input_ids[0, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(loss, [hidden])
            _finite(gradient, last, batch, "gradients of the loss")
            self._back.put_hidden(0, number, gradient)

    def _block(self, step: int, layer: int) -> dict[str, Tensor]:
        """Sums of one block over all rows; what the block below gets is kept."""
        block = self.model.block(layer)
        weights = {
            matrix.name: block.get_parameter(f"{matrix.name}.weight").requires_grad_(True)
            for matrix in self.model.layout.matrices(block)
        }
        sums = {
            (name, statistic): torch.zeros(weight.shape, device=weight.device)
            for name, weight in weights.items()
            for statistic in self.names
        }
        for number, batch in enumerate(self.batches):
            hidden = self._hidden(layer, number).requires_grad_(True)
            above = self._back.hidden(step, number).to(self.model.device)
            out = self.model.run(block, hidden, self._call(batch, layer))
            # An expert that got no token of the row has no gradient.
            below, *found = torch.autograd.grad(
                out, [hidden, *weights.values()], above, allow_unused=True
            )
            _finite(below, layer, batch, "gradients")
            for name, gradient in zip(weights, found, strict=True):
                for statistic in self.names if gradient is not None else ():
                    sums[name, statistic] += _POWERS[statistic](gradient.float())
            self._back.put_hidden(step + 1, number, below)
        turned = self.model.layout.transposed
        made = {key: array.T if turned else array for key, array in sums.items()}
        count = len(self.batches)
        return named(made | {(name, "gradient_rows"): torch.tensor(count) for name in weights})

    def _hidden(self, layer: int, number: int) -> Tensor:
        return self._inputs.hidden(layer, number).to(self.model.device)

    def _call(self, batch: Batch, layer: int) -> Any:
        return self.model.prepare(batch.input_ids, batch.valid).calls[layer]


class _Inputs(LayerJournal):
    """What every block takes, for all blocks at once."""

    def forget(self, layer: int) -> None:
        """Delete what a layer takes: no block needs it any more."""
        for path in self.folder.glob(f"hidden-{layer:05d}-*.safetensors"):
            path.unlink()


def _finite(array: Tensor, layer: int, batch: Batch, what: str) -> None:
    if not bool(torch.isfinite(array).all()):
        raise ModelError(
            f"layer {layer}: expected finite {what}; found a NaN or an infinity in calibration row"
            f" {int(batch.rows[0])}. Use a wider dtype, or look at that row."
        )
