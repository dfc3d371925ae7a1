"""A model whose parts can be set to any budget: what a genome of a search is worth.

The dense model is in memory as a whole. What a part becomes at a budget is made once by the
compressor that would carry the plan out, on statistics of the dense model, and kept on disk; a
genome is looked at by copying the parts in which it differs from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import InputError
from ...pruners.models.streamed_model import Prepared, StreamedModel
from .compressor import Compressor
from .evolution import Genome
from .journal import LayerJournal, unfinished
from .model_tables import save_tensors
from .parts import Part, half_of
from .plan import Layers
from .teacher import Targets, target_divergence, teacher_targets
from .walk import Batch, LayerVisit, batches_of

# A plan row of one part to the compressor that carries it out.
Maker = Callable[[Mapping[str, Any]], Compressor]


class LevelStore:
    """What each part becomes at each budget, made when it is first asked for.

    Parameters
    ----------
    folder
        Of this search alone: a file a part and budget, written whole or not at all.
    rows
        Plan rows of the parts, in their order.
    statistics
        Of the dense model's layers; None where the compressor wants none.
    """

    def __init__(
        self,
        folder: Path,
        model: StreamedModel,
        parts: Sequence[Part],
        rows: Sequence[Mapping[str, Any]],
        make: Maker,
        statistics: Layers | None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._model = folder, model
        self._parts, self._rows, self._make = parts, rows, make
        self._statistics = statistics
        self._layer = lru_cache(maxsize=2)(self._read_layer)

    def tensors(self, place: int, keep: int) -> dict[str, Tensor]:
        """The tensors of a part that keeps so many units, by their names in the block."""
        path = self._folder / f"level-{place:05d}-{keep}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            made = self._level(place, keep)
        with unfinished(path) as to:
            save_tensors(made, to)
        return made

    def _level(self, place: int, keep: int) -> dict[str, Tensor]:
        part, layer = self._parts[place], self._parts[place].layer
        row = {**self._rows[place], "keep": keep}
        compressor = self._make(row)
        block = self._model.block(layer)
        if compressor.wanted and self._statistics is None:
            raise InputError(
                f"search_budgets needs the statistics {', '.join(sorted(compressor.wanted))} of the"
                " dense model; found none. Give a weight_statistics step as input `statistics`."
            )
        statistics = self._layer(layer) if compressor.wanted else {}
        visit = LayerVisit(self._model, layer, block, (), LayerJournal(self._folder))
        compressor(visit, statistics, [row])
        return {name: found.contiguous().cpu() for name, found in _of_part(block, part, visit)}

    def _read_layer(self, layer: int) -> Mapping[tuple[str, str], Tensor]:
        assert self._statistics is not None
        return self._statistics.layer(layer)


def _of_part(block: nn.Module, part: Part, visit: LayerVisit) -> list[tuple[str, Tensor]]:
    """The parameters of a part's matrices."""
    modules = [
        matrix.name
        for matrix in visit.layout.matrices(block)
        if matrix.name == part.module or (part.unit != "weight" and half_of(matrix) == part.half)
    ]
    return [
        (f"{name}.{leaf}", param.detach())
        for name in modules
        for leaf, param in block.get_submodule(name).named_parameters()
    ]


class Supernet:
    """The divergence of a genome's model from the dense one: the fitness of a search.

    KL(dense ‖ genome), nats a token, over all tokens of the rows, by the dense model's `top`
    likeliest next tokens and the rest as one. Stage k looks at the first `tokens[k]` tokens of
    the rows in their order (whole rows, at least one).

    Raises InputError where there are no rows, or a row has no token.
    """

    def __init__(
        self,
        model: StreamedModel,
        rows: Sequence[npt.NDArray[np.integer[Any]]],
        levels: LevelStore,
        parts: Sequence[Part],
        *,
        tokens: Sequence[int],
        top: int,
        tokens_a_batch: int,
    ) -> None:
        self._model, self._levels, self._parts = model, levels, parts
        self._blocks = [model.block(layer) for layer in range(model.layers)]
        self._now = [-1] * len(parts)  # which budget each part is set to; -1: as in the file
        self._looks = [
            [_Look(self, batch, top) for batch in batches_of(segment, tokens=tokens_a_batch)]
            for segment in segments(rows, tokens)
        ]
        self._known: dict[tuple[Genome, int], tuple[float, int]] = {}

    def __call__(self, genomes: Sequence[Genome], stage: int) -> list[float]:
        """Fitness of each genome at a stage, lower is better."""
        return [self._fitness(genome, stage) for genome in genomes]

    def _fitness(self, genome: Genome, stage: int) -> float:
        total, count = 0.0, 0
        for segment in range(stage + 1):
            if (genome, segment) not in self._known:
                self._set(genome)
                self._known[genome, segment] = self._divergence(segment)
            found = self._known[genome, segment]
            total, count = total + found[0], count + found[1]
        return total / count

    def _divergence(self, segment: int) -> tuple[float, int]:
        total, count = 0.0, 0
        for look in self._looks[segment]:
            logits = self.logits(look.batch, look.prepared)
            total += float(target_divergence(logits, look.targets).double().sum())
            count += len(logits)
        return total, count

    def logits(self, batch: Batch, prepared: Prepared) -> Tensor:
        """Of all tokens of a batch that are no padding, (N, V), as the parts are set now."""
        hidden = prepared.hidden
        with torch.no_grad():
            for block, call in zip(self._blocks, prepared.calls, strict=True):
                hidden = self._model.run(block, hidden, call)
            made = self._model.logits(hidden, batch.input_ids, batch.valid)
        return made[batch.valid.to(made.device)].float()

    def prepare(self, batch: Batch) -> Prepared:
        """A batch up to the first block."""
        return self._model.prepare(batch.input_ids, batch.valid)

    def _set(self, genome: Genome) -> None:
        for place, keep in enumerate(genome):
            if self._now[place] == keep:
                continue
            block = self._blocks[self._parts[place].layer]
            for name, tensor in self._levels.tensors(place, keep).items():
                block.get_parameter(name).data.copy_(tensor)
            self._now[place] = keep


class _Look:
    """A batch, ready to be run, and what the dense model says about it."""

    def __init__(self, net: Supernet, batch: Batch, top: int) -> None:
        self.batch, self.prepared = batch, net.prepare(batch)
        self.targets: Targets = teacher_targets(net.logits(batch, self.prepared), top)


def segments(
    rows: Sequence[npt.NDArray[np.integer[Any]]], tokens: Sequence[int]
) -> list[list[npt.NDArray[np.integer[Any]]]]:
    """The rows that each stage adds to those before it, for as many tokens as it looks at.

    A stage for which no rows are left adds none.
    """
    if not rows:
        raise InputError("search_budgets: expected at least one row to judge by; found none.")
    made: list[list[npt.NDArray[np.integer[Any]]]] = []
    at = seen = 0
    for stage, most in enumerate(tokens):
        start = at
        while at < len(rows) and ((stage == 0 and at == 0) or seen + len(rows[at]) <= most):
            if not len(rows[at]):
                raise InputError(f"search_budgets: expected tokens in row {at}; found none.")
            seen += len(rows[at])
            at += 1
        made.append(list(rows[start:at]))
    return made
