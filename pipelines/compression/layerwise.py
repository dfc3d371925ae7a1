"""Recovery block by block: each block of a compressed model is brought near the dense one.

A block gets what the compressed blocks before it give, and is trained so that its outputs are
near those of the dense block for the same inputs, in squared error relative to the outputs. So
that errors do not add up unseen, the dense block is asked about the inputs that really come.
PERP (arXiv:2312.15230) reconstructs each matrix on its own; a whole block is reconstructed here,
which also holds where heads or neurons were removed, since a block's outputs keep their width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.rules import best_first, uniform
from .journal import LayerJournal
from .recovery_rows import RowBatch
from .recovery_settings import Settings, rate
from .whole_model import WholeModel

Parameters = Mapping[int, Mapping[str, nn.Parameter]]


def check_dense(model: WholeModel, dense: StreamedModel) -> None:
    """Refuse a dense model whose blocks are not those that the compressed ones come from.

    Raises
    ------
    ModelError
        Another architecture, number of layers or width, or other embeddings (a rotated model).
    """
    ours, theirs = model.source, dense
    advice = "Take mask_lora or distil, or the dense model that was compressed."
    for key in ("model_type", "hidden_size", theirs.layout.depth):
        found, wanted = getattr(ours.config, key), getattr(theirs.config, key)
        if found != wanted:
            raise ModelError(
                f"layerwise: expected the dense model's {key} {wanted}; found {found} in the"
                f" compressed one. {advice}"
            )
    embedded = ours.model.get_input_embeddings().weight
    dense_embedded = theirs.model.get_input_embeddings().weight
    if embedded.shape != dense_embedded.shape or not torch.allclose(embedded, dense_embedded):
        raise ModelError(
            "layerwise: expected the dense model's embeddings; found others in the compressed"
            f" one, whose hidden states may be rotated. {advice}"
        )


def train_layers(
    model: WholeModel,
    dense: StreamedModel,
    batches: Sequence[RowBatch],
    judge: Sequence[RowBatch],
    settings: Settings,
    parameters: Parameters,
    *,
    seed: int,
    work: Path,
) -> list[dict[str, float]]:
    """Train each block for `settings.steps` steps; its best state on `judge` stays in it.

    `parameters` are those trained, by layer. Hidden states lie under `work` meanwhile, those of
    one layer at a time. Gives for each layer the relative squared error on `judge` before and
    after.
    """
    check_dense(model, dense)
    streams = [
        _Stream(dense, batches, LayerJournal(work / "trained")),
        _Stream(dense, judge, LayerJournal(work / "judged")),
    ]
    figures = []
    for layer, block in enumerate(model.blocks):
        target = dense.block(layer)
        before, after = _train_block(
            block, target, streams, settings, list(parameters.get(layer, {}).values()), seed, layer
        )
        figures.append({"error_before": before, "error_after": after})
        for stream in streams:
            stream.advance(block, layer)
    return figures


class _Stream:
    """Batches and what a layer gets of them, on disk."""

    def __init__(
        self, dense: StreamedModel, batches: Sequence[RowBatch], journal: LayerJournal
    ) -> None:
        self.dense, self.batches, self.journal = dense, batches, journal
        for number, batch in enumerate(batches):
            prepared = dense.prepare(batch.input_ids, batch.valid)
            journal.put_hidden(0, number, prepared.hidden)

    def pair(
        self, block: nn.Module, target: nn.Module, layer: int, number: int
    ) -> tuple[Tensor, Tensor]:
        """Outputs of both blocks at the valid places of a batch, (N, d) each."""
        batch = self.batches[number]
        hidden = self.journal.hidden(layer, number).to(self.dense.device)
        call = self.dense.prepare(batch.input_ids, batch.valid).calls[layer]
        at = batch.valid.to(hidden.device)
        with torch.no_grad():
            wanted = self.dense.run(target, hidden, call)[at]
        return self.dense.run(block, hidden, call)[at], wanted

    def advance(self, block: nn.Module, layer: int) -> None:
        """Keep what the next layer gets, and delete what this one got."""
        for number, batch in enumerate(self.batches):
            hidden = self.journal.hidden(layer, number).to(self.dense.device)
            call = self.dense.prepare(batch.input_ids, batch.valid).calls[layer]
            with torch.no_grad():
                out = self.dense.run(block, hidden, call)
            self.journal.put_hidden(layer + 1, number, out)
        for path in self.journal.folder.glob(f"hidden-{layer:05d}-*"):
            path.unlink()


def _train_block(
    block: nn.Module,
    target: nn.Module,
    streams: Sequence[_Stream],
    settings: Settings,
    parameters: list[nn.Parameter],
    seed: int,
    layer: int,
) -> tuple[float, float]:
    trained, judged = streams
    before = best = _error(block, target, judged, layer)
    if not parameters:
        return before, before
    state = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    numbers = _numbers(len(trained.batches), settings.steps, seed + layer)
    every = math.ceil(settings.steps / settings.evaluations)
    for step, number in enumerate(numbers, 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings.steps)
        found, wanted = trained.pair(block, target, layer, number)
        loss = (found - wanted).square().sum() / wanted.square().sum()
        if not bool(torch.isfinite(loss)):
            raise ModelError(
                f"layerwise, layer {layer}: expected a finite loss, found {float(loss)} at step"
                f" {step}. Lower `learning_rate` (it is {settings.learning_rate:g})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0 or step == settings.steps:
            error = _error(block, target, judged, layer)
            if error < best:
                best, state = error, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, state, strict=True):
            parameter.copy_(value)
    return before, best


def _error(block: nn.Module, target: nn.Module, stream: _Stream, layer: int) -> float:
    """Squared error over all batches, relative to the dense outputs."""
    apart = size = 0.0
    with torch.no_grad():
        for number in range(len(stream.batches)):
            found, wanted = stream.pair(block, target, layer, number)
            apart += float((found - wanted).double().square().sum())
            size += float(wanted.double().square().sum())
    return apart / size


def _numbers(count: int, steps: int, seed: int) -> list[int]:
    """Batches to train on: all in a new order in every epoch."""
    made: list[int] = []
    epoch = 0
    while len(made) < steps:
        drawn: Any = uniform(seed + (epoch << 20), np.arange(count))
        made += best_first(drawn, np.arange(count)).tolist()
        epoch += 1
    return made[:steps]
