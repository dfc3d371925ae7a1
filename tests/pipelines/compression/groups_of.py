"""A small model walked through a compressor, saved, and loaded by stock transformers."""

import json

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prunery.pipelines.compression.journal import LayerJournal
from prunery.pipelines.compression.model_tables import write_model
from prunery.pipelines.compression.statistics import layer_statistics
from prunery.pipelines.compression.walk import batches_of, walk
from prunery.pruners.models.streamed_model import StreamedModel

CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def token_rows(count=6, length=14, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, length) for _ in range(count)]


def plan_row(layer, module, unit, total, keep, kept=None):
    return {
        "layer": layer,
        "module": module,
        "unit": unit,
        "total": total,
        "keep": keep,
        "kept": kept,
    }


def compressed(folder, compressor, plan, work, *, rows=None, tables=None, tokens=10**6):
    """Walk the model of `folder` through a compressor and save the outcome.

    Returns the new folder and the rows of the compressor. `tables` (layer to statistics) are
    given beside those that the walk makes.
    """
    model = StreamedModel(folder)
    batches = batches_of(rows or token_rows(), tokens=tokens)
    journal = LayerJournal(work / "journal")
    done, dropped = [], set()

    def visit(here):
        found = dict(layer_statistics(here, compressor.wanted, keep=False))
        found |= (tables or {}).get(here.layer, {})
        tensors, rows = compressor(here, found, [r for r in plan if r["layer"] == here.layer])
        done.extend({"layer": here.layer, **row} for row in rows)
        if here.dropped:
            dropped.add(here.layer)
        return tensors, []

    walk(model, batches, journal, visit)
    kept = [layer for layer in range(model.layers) if layer not in dropped]
    inside = model.layout.blocks.removeprefix(f"{model.model.base_model_prefix}.")
    prefixed = any(name.startswith(model.layout.blocks) for name in model.tensors.names())
    root = model.layout.blocks if prefixed else inside

    def parts():
        yield "0", {name: model.tensors.read(name) for name in model.outside_names()}
        for new, layer in enumerate(kept):
            yield (
                f"{new + 1}",
                {
                    f"{root}.{new}.{model.stored(name)}": tensor
                    for name, tensor in journal.tensors(layer).items()
                },
            )

    config = json.loads((folder / "config.json").read_text()) | dict(compressor.config())
    if dropped:
        config[model.layout.depth] = len(kept)
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][layer] for layer in kept]
        if config.get("mlp_only_layers") is not None:
            old = config["mlp_only_layers"]
            config["mlp_only_layers"] = [new for new, layer in enumerate(kept) if layer in old]
    out = work / "out"
    out.mkdir()
    write_model(out, parts(), config, folder)
    return out, done


def load(folder, head="causal"):
    """The model as stock transformers loads it; no key may be missing or left over."""
    model, info = CLASSES[head].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def logits_of(model, rows=None):
    with torch.no_grad():
        return [model(torch.from_numpy(row)[None]).logits[0] for row in rows or token_rows()]


def blocks_of(model, layout):
    return list(model.get_submodule(layout.blocks))


def silence(module, channels):
    """Zero some inputs of a matrix whenever it is called: what removal means."""

    def hook(_, args):
        hidden = args[0].clone()
        hidden[..., channels] = 0
        return (hidden, *args[1:])

    module.register_forward_pre_hook(hook)
