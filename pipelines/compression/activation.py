"""Thresholds of a model's activations, found and judged layer by layer.

The dense model is walked once to find them (each layer's numbers are passed two or three times,
none is kept), and once more for each setting that is judged. At most one block is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...errors import InputError
from ...pruners.models.sparse_activation import (
    Kind,
    Site,
    Thresholds,
    apply_to_block,
    readers,
    sites,
)
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.weight.activation import (
    SizeQuantiles,
    cett_sums,
    chess_level,
    greedy_shares,
    neuron_thresholds,
    threshold_under,
)
from .journal import LayerJournal
from .walk import Batch, LayerVisit, Made, walk

Method = Literal["cats", "chess", "teal", "ppl_p"]
GATED = ("cats", "chess")
Take = Callable[[Tensor], None]
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdSearch:
    """What is looked for.

    Attributes
    ----------
    method
        See `pruners.weight.activation`.
    sparsity
        Share of the numbers at or under a threshold; not of ppl_p.
    levels, step
        Of teal: every place at `sparsity`, or greedy by steps within each block.
    grid
        Of ppl_p: thresholds tried in a layer, at equal steps of the share of inactive neurons.
    """

    method: Method
    sparsity: float = 0.5
    levels: Literal["uniform", "greedy"] = "uniform"
    step: float = 0.1
    grid: int = 64


def find_thresholds(
    model: StreamedModel,
    batches: Sequence[Batch],
    journal: LayerJournal,
    search: ThresholdSearch,
    each_layer: Callable[[int], None] | None = None,
) -> None:
    """Walk the dense model; the journal's layers then hold what each gave (see `thresholds_of`).

    A killed walk goes on where it stopped and finds the same.
    """
    find = {"cats": _cats, "chess": _chess, "teal": _teal, "ppl_p": _curve}[search.method]
    walk(model, batches, journal, lambda visit: find(visit, search), each_layer=each_layer)


def thresholds_of(
    journal: LayerJournal, layers: int, cett: float | None = None
) -> dict[tuple[int, Site], Tensor]:
    """The thresholds that a walk found; of ppl_p those for a CETT common to all layers.

    There the places of the grid were measured, so the threshold is the last of them before the
    CETT is first exceeded: the layer's own CETT is under the limit and was computed, not assumed.
    """
    made: dict[tuple[int, Site], Tensor] = {}
    for layer in range(layers):
        found, rows = journal.tensors(layer), journal.rows(layer)
        if cett is not None:
            grid = found["grid"].tolist()
            place = threshold_under(grid, found["cett"].tolist(), cett)
            value = grid[place] if place >= 0 else 0.0
            site = Site(rows[0]["module"], "input")
            made[layer, site] = neuron_thresholds(value, found["norm"])
            continue
        for row in rows:
            site = Site(row["module"], cast("Kind", row["kind"]))
            made[layer, site] = found[f"{site.module}/{site.kind}"]
    return made


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model over rows: mean loss of their targets in nats, how many, and what lived where."""

    loss: float
    tokens: int
    live: Mapping[tuple[int, Site], tuple[int, int]]

    def share(self) -> float:
        """Live numbers over all numbers that thresholds looked at; 1 without thresholds."""
        total = sum(count for _, count in self.live.values())
        return sum(alive for alive, _ in self.live.values()) / total if total else 1.0


def evaluate(
    model: StreamedModel,
    batches: Sequence[Batch],
    labels: Sequence[Sequence[int]],
    folder: Path,
    thresholds: Thresholds,
) -> Evaluation:
    """The loss with thresholds applied in every block; none is the dense model.

    Parameters
    ----------
    labels
        Of each row, as long as its tokens: the token itself, or -100 where it is no target.
    folder
        For hidden states on the way; removed at the end.
    """
    live: dict[tuple[int, Site], tuple[int, int]] = {}

    def visit(here: LayerVisit) -> Made:
        mine = {site: value for (layer, site), value in thresholds.items() if layer == here.layer}

        def count(site: Site, alive: Tensor) -> None:
            kept = _valid(here, alive)
            before = live.get((here.layer, site), (0, 0))
            live[here.layer, site] = (before[0] + int(kept.sum()), before[1] + kept.numel())

        with apply_to_block(here.block, here.layout, mine, layer=here.layer, count=count):
            here.forward()
        return {}, []

    journal = LayerJournal(folder)
    journal.remove()  # of a run that was killed: its hidden states are of other thresholds
    journal = LayerJournal(folder)
    walk(model, batches, journal, visit)
    loss, tokens = 0.0, 0
    for number, batch in enumerate(batches):
        found = _loss(model, batch, journal.hidden(model.layers, number), labels)
        loss, tokens = loss + found[0], tokens + found[1]
    journal.remove()
    if not tokens:
        raise InputError(
            f"expected targets in the {len(labels)} rows to judge the model on; every label is"
            f" {_IGNORED}. Give rows of which some tokens may be trained."
        )
    return Evaluation(loss / tokens, tokens, live)


def _loss(
    model: StreamedModel, batch: Batch, hidden: Tensor, labels: Sequence[Sequence[int]]
) -> tuple[float, int]:
    targets = torch.full(batch.input_ids.shape, _IGNORED)
    for place, row in enumerate(batch.rows):
        found = torch.from_numpy(np.asarray(labels[int(row)], np.int64))
        targets[place, : len(found)] = found
    with torch.no_grad():
        logits = model.logits(hidden.to(model.device), batch.input_ids, batch.valid)
        wanted = targets[:, 1:].reshape(-1).to(logits.device)
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        total = functional.cross_entropy(predicted, wanted, ignore_index=_IGNORED, reduction="sum")
    return float(total), int((wanted != _IGNORED).sum())


def _valid(visit: LayerVisit, values: Tensor) -> Tensor:
    """(tokens, n) of (B, T, n) or (B T, n): padded places are left out."""
    assert visit.current is not None
    valid = visit.current.valid.reshape(-1).to(values.device)
    return values.reshape(-1, values.shape[-1])[valid]


@contextmanager
def _watching(
    visit: LayerVisit, taken: Mapping[Site, Take], made: Mapping[str, Take] | None = None
) -> Iterator[None]:
    """Inside, the block's numbers at those places go by: (tokens, n) of a batch at a time.

    `made` is for what modules give, by their paths.
    """
    handles = []
    block, layout = visit.block, visit.layout

    def before(take: Take) -> Callable[..., None]:
        return lambda _, args: take(_valid(visit, args[0]))

    def after(take: Take, change: Callable[[Tensor], Tensor] | None) -> Callable[..., None]:
        return lambda _, args, out: take(_valid(visit, change(out) if change else out))

    for site, take in taken.items():
        module = block.get_submodule(site.module)
        if site.kind == "gate":
            act: Any = block.get_submodule(layout.mlp).act_fn
            handles.append(module.register_forward_hook(after(take, act)))
        else:
            handles.append(module.register_forward_pre_hook(before(take)))
    for path, take in (made or {}).items():
        handles.append(block.get_submodule(path).register_forward_hook(after(take, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantiles(
    visit: LayerVisit, places: Sequence[Site], shares: Sequence[float], scale: Tensor | None = None
) -> dict[Site, list[float]]:
    """Exact quantiles of the sizes at each place, in two forward passes."""
    found = {site: SizeQuantiles(shares) for site in places}

    def taker(counter: SizeQuantiles) -> Take:
        return lambda values: counter.add(values if scale is None else values.float() * scale)

    with _watching(visit, {site: taker(counter) for site, counter in found.items()}):
        visit.forward()
        for counter in found.values():
            counter.refine()
        visit.forward(keep=False)
    return {site: counter.values() for site, counter in found.items()}


def _made(thresholds: Mapping[Site, tuple[Tensor, float]]) -> Made:
    """Tensors and rows for the journal: a threshold and its share for each place."""
    tensors = {f"{site.module}/{site.kind}": value for site, (value, _) in thresholds.items()}
    rows = [
        {"module": site.module, "kind": site.kind, "share": share}
        for site, (_, share) in thresholds.items()
    ]
    return tensors, rows


def _cats(visit: LayerVisit, search: ThresholdSearch) -> Made:
    assert visit.layout.gate is not None
    site = Site(visit.layout.gate, "gate")
    found = _quantiles(visit, [site], [search.sparsity])
    return _made({site: (torch.tensor(found[site][0]), search.sparsity)})


def _chess(visit: LayerVisit, search: ThresholdSearch) -> Made:
    """Two passes: means of |up| and counts; then each row's quantile under those means."""
    layout, share = visit.layout, search.sparsity
    assert layout.gate is not None
    gate = Site(layout.gate, "gate")
    attention = {
        site: SizeQuantiles([share])
        for site in (Site(layout.query, "alone"), Site(layout.output, "alone"))
    }
    counting: dict[Site, Take] = {site: counter.add for site, counter in attention.items()}
    sums: list[Tensor] = []
    tokens: list[int] = []

    def take_up(values: Tensor) -> None:
        sums.append(values.abs().double().sum(0))
        tokens.append(len(values))

    with _watching(visit, counting, {layout.up: take_up}):
        visit.forward()
    mean = (torch.stack(sums).sum(0) / sum(tokens)).float()
    for counter in attention.values():
        counter.refine()
    levels: list[float] = []

    def take_gate(values: Tensor) -> None:
        assert visit.current is not None
        sizes: list[int] = visit.current.valid.sum(1).tolist()
        levels.extend(chess_level(sample, mean, share) for sample in torch.split(values, sizes))

    with _watching(visit, {**counting, gate: take_gate}):
        visit.forward(keep=False)
    layer = math.fsum(levels) / len(levels)
    made = {gate: (neuron_thresholds(layer, mean).cpu(), share)}
    for site, counter in attention.items():
        made[site] = (torch.tensor(counter.values()[0]), share)
    return _made(made)


def _teal(visit: LayerVisit, search: ThresholdSearch) -> Made:
    places = sites(visit.block, visit.layout)
    if search.levels == "uniform":
        found = _quantiles(visit, places, [search.sparsity])
        return _made({site: (torch.tensor(found[site][0]), search.sparsity) for site in places})
    count = round(1 / search.step)
    shares = sorted({min(1.0, round(i * search.step, 9)) for i in range(count + 2)})
    found = _quantiles(visit, places, shares)
    values = {site.module: dict(zip(shares, found[site], strict=True)) for site in places}
    parameters = {
        site.module: sum(
            cast(Tensor, visit.block.get_submodule(matrix.name).weight).numel()
            for matrix in readers(visit.block, visit.layout, site.module)
        )
        for site in places
    }

    def error(chosen: Mapping[str, float]) -> float:
        return _block_error(visit, {name: values[name][share] for name, share in chosen.items()})

    best = greedy_shares(error, parameters, search.sparsity, search.step)
    return _made(
        {
            site: (torch.tensor(values[site.module][best[site.module]]), best[site.module])
            for site in places
        }
    )


def _block_error(visit: LayerVisit, thresholds: Mapping[str, float]) -> float:
    """Squared error of the block's output over all valid tokens, against the dense one."""
    placed = {Site(name, "input"): torch.tensor(value) for name, value in thresholds.items()}
    total = 0.0
    with apply_to_block(visit.block, visit.layout, placed, layer=visit.layer):
        for number, batch in enumerate(visit.batches):
            dense = visit.journal.hidden(visit.layer + 1, number).to(visit.model.device)
            _, out = visit.one(number)
            valid = batch.valid.to(out.device)
            total += float((out[valid].double() - dense[valid].double()).square().sum())
    return total


def _curve(visit: LayerVisit, search: ThresholdSearch) -> Made:
    """The CETT at thresholds that leave 0, 1/m, ... 1 of the neurons inactive."""
    from ...pruners.models.block_layouts import weight_of

    site = Site(visit.layout.down, "input")
    down = weight_of(visit.block.get_submodule(site.module), visit.layout)
    norm = down.float().norm(dim=0)
    shares = [place / search.grid for place in range(search.grid + 1)]
    grid = _quantiles(visit, [site], shares, norm)[site]
    sums: list[Tensor] = []
    tokens: list[int] = []

    def take(values: Tensor) -> None:
        sums.append(cett_sums(values, down, grid))
        tokens.append(len(values))

    with _watching(visit, {site: take}):
        visit.forward(keep=False)
    cett = torch.stack(sums).sum(0) / sum(tokens)
    tensors = {
        "grid": torch.tensor(grid, dtype=torch.float64),
        "cett": cett,
        "norm": norm.cpu(),
    }
    return tensors, [{"module": site.module, "kind": site.kind, "share": None}]
