"""A layer's visit and its statistics, made plainly: hooks and float64."""

from collections import defaultdict

import numpy as np
import torch

from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.walk import LayerVisit, batches_of
from prunery.pruners.models.streamed_model import StreamedModel


def visit_of(folder, work, *, layer=0, rows=6, length=16, dtype="float32", seed=0):
    """A visit to one layer of a saved model; the layers before it are dense."""
    model = StreamedModel(folder, dtype=dtype)
    ids = np.random.default_rng(seed).integers(3, 300, (rows, length))
    batches = batches_of(list(ids), tokens=64)
    journal = LayerJournal(work)
    for number, batch in enumerate(batches):
        journal.put_hidden(0, number, model.prepare(batch.input_ids, batch.valid).hidden)
    for before in range(layer):
        LayerVisit(model, before, model.block(before), batches, journal).forward()
    return LayerVisit(model, layer, model.block(layer), batches, journal)


def inputs_of(visit):
    """What each matrix reads, by its name: (tokens, in) float64."""
    seen, hooks = defaultdict(list), []
    for matrix in visit.layout.matrices(visit.block):

        def keep(module, args, name=matrix.name):
            seen[name].append(args[0].detach().double().reshape(-1, args[0].shape[-1]))

        hooks.append(visit.block.get_submodule(matrix.name).register_forward_pre_hook(keep))
    visit.forward(keep=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def statistics_of(visit, *, seed=0):
    """Every statistic of every matrix's inputs; gradients are random."""
    found, inputs = {}, inputs_of(visit)
    made = torch.Generator().manual_seed(seed)
    for matrix in visit.layout.matrices(visit.block):
        module = visit.layout.input_of(matrix)
        weight = visit.block.get_submodule(matrix.name).weight
        size = weight.shape[0] if visit.layout.transposed else weight.shape[1]
        shape = weight.T.shape if visit.layout.transposed else weight.shape
        x = inputs.get(matrix.name, torch.zeros(0, size, dtype=torch.float64))
        r = torch.rand(len(x), 1, generator=made, dtype=torch.float64) * 2
        gradient = torch.randn(4, *shape, generator=made) * 0.05
        found |= {
            (module, "count"): torch.tensor(len(x)),
            (module, "sum_squares"): x.square().sum(0),
            (module, "gram"): (x.T @ x).float(),
            (module, "weighted_gram"): (x.T @ (x * r)).float(),
            (matrix.name, "gradient_square"): gradient.square().sum(0),
            (matrix.name, "gradient_abs"): gradient.abs().sum(0),
            (matrix.name, "gradient_rows"): torch.tensor(4),
        }
    return found


def plan_of(visit, *, keep=0.5, pattern=None, bits=None, group_size=None):
    """A row for each matrix of a layer."""
    rows = []
    for matrix in visit.layout.matrices(visit.block):
        total = visit.block.get_submodule(matrix.name).weight.numel()
        kept = round(total * keep) if pattern is None else total * pattern[0] // pattern[1]
        rows.append(
            {
                "layer": visit.layer,
                "module": matrix.name,
                "unit": "weight",
                "total": total,
                "keep": kept,
                "parameters": total,
                "n": pattern and pattern[0],
                "m": pattern and pattern[1],
                "bits": bits,
                "group_size": group_size,
                "importance": None,
                "kept": None,
            }
        )
    return rows
