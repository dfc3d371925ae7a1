"""A plan carried out: layer by layer through the model, then its files.

What a layer becomes is recorded before the next is begun, so that a killed run goes on where it
stood. With `propagate="compressed"` a layer is calibrated on what the layers before it give after
they were compressed, as Wanda, SparseGPT and GPTQ do; with "dense" on what the source model gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ...errors import InputError
from ...pruners.models.streamed_model import StreamedModel
from ...pruners.signals.block_statistics import TokenWeights
from .compressor import CODES, Compressor, LayerStatistics
from .journal import LayerJournal
from .model_tables import save_tensors, write_model
from .statistics import layer_statistics
from .walk import Batch, LayerVisit, Made, walk

Propagate = Literal["compressed", "dense"]


def codes_name(layer: int) -> str:
    """The file that holds the codes of a layer's quantised weights."""
    return f"codes-{layer:05d}.safetensors"


def compress_layers(
    model: StreamedModel,
    batches: Sequence[Batch],
    journal: LayerJournal,
    compressor: Compressor,
    plan: Sequence[Mapping[str, Any]],
    *,
    propagate: Propagate = "compressed",
    given: Callable[[int], LayerStatistics] | None = None,
    weights: TokenWeights | None = None,
    each_layer: Callable[[int], None] | None = None,
    autocast: bool = False,
) -> None:
    """Walk through the model and record what each layer becomes.

    `given` gives statistics of a layer that a walk cannot make (gradients), `weights` are those
    of tokens for "weighted_gram", and `each_layer` is called with each layer that is done;
    `autocast` lets passes multiply in bfloat16.

    A journal whose hidden states were lost is begun anew: the same bytes come out.
    """
    if journal.done() < model.layers and not journal.has_hidden(journal.done(), len(batches)):
        journal.remove()
        journal.folder.mkdir(parents=True)

    def visit(here: LayerVisit) -> Made:
        rows = [row for row in plan if row["layer"] == here.layer]
        dense = propagate == "dense"
        statistics = dict(given(here.layer)) if given is not None else {}
        statistics |= layer_statistics(here, compressor.wanted, keep=dense, weights=weights)
        made = compressor(here, statistics, rows)
        flag = [{"dropped": here.dropped}]
        return made[0], [*flag, *({"layer": here.layer, **row} for row in made[1])]

    # Nothing reads what the last layer gives.
    walk(
        model,
        batches,
        journal,
        visit,
        each_layer=each_layer,
        outputs=False,
        autocast=autocast,
    )


def compressed_rows(journal: LayerJournal, layers: int) -> list[dict[str, Any]]:
    """The rows that the compressor gave, of all layers; layers bear their first numbers."""
    return [row for layer in range(layers) for row in journal.rows(layer)[1:]]


def kept_layers(journal: LayerJournal, layers: int) -> list[int]:
    """The layers that were not dropped."""
    return [layer for layer in range(layers) if not journal.rows(layer)[0]["dropped"]]


def write_compressed(
    model: StreamedModel, journal: LayerJournal, changes: Mapping[str, Any], folder: Path
) -> list[Path]:
    """The files of the compressed model, in a folder that exists and is empty.

    Weights keep the dtype that they have in the source. Layers that were dropped leave no gap in
    the numbers. Codes of quantised weights lie in files beside, by the name of their weight.
    """
    kept = kept_layers(journal, model.layers)
    if not kept:
        raise InputError("expected at least one layer to stay; the plan drops all of them.")
    written = write_model(
        folder, _parts(model, journal, kept), _config(model, kept, changes), model.folder
    )
    for new, layer in enumerate(kept):
        codes = {
            _codes_key(_file_name(model, layer, new, name.removeprefix(CODES))): tensor
            for name, tensor in journal.tensors(layer).items()
            if name.startswith(CODES)
        }
        if codes:
            path = folder / codes_name(new)
            save_tensors(codes, path)
            written.append(path)
    return sorted(written)


def _codes_key(name: str) -> str:
    """`….weight.codes` as `….codes`."""
    module, _, kind = name.rpartition(".")
    return f"{module.removesuffix('.weight')}.{kind}"


def _parts(
    model: StreamedModel, journal: LayerJournal, kept: Sequence[int]
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    yield "00000", {name: model.tensors.read(name) for name in model.outside_names()}
    for new, layer in enumerate(kept):
        stored = next(iter(model.block_names(layer).values()))
        dtype = model.tensors.read(stored).dtype
        yield (
            f"{new + 1:05d}",
            {
                _file_name(model, layer, new, name): tensor.to(dtype)
                for name, tensor in journal.tensors(layer).items()
                if not name.startswith(CODES)
            },
        )


def _file_name(model: StreamedModel, layer: int, new: int, name: str) -> str:
    """What a tensor of a block is called in files, under the layer's new number."""
    inside, stored = next(iter(model.block_names(layer).items()))
    prefix = stored.removesuffix(model.stored(inside))
    return f"{prefix.removesuffix(f'{layer}.')}{new}.{model.stored(name)}"


def _config(
    model: StreamedModel, kept: Sequence[int], changes: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model.folder / "config.json").read_text("utf-8"))
    for key, value in changes.items():
        found[_key(model, found, key)] = value
    if len(kept) < model.layers:
        found[_key(model, found, model.layout.depth)] = len(kept)
        for key, value in found.items():
            if key == "layer_types" and isinstance(value, list) and len(value) == model.layers:
                found[key] = [value[layer] for layer in kept]
            if key == "mlp_only_layers" and isinstance(value, list):
                found[key] = [new for new, layer in enumerate(kept) if layer in value]
    return found


def _key(model: StreamedModel, config: Mapping[str, Any], key: str) -> str:
    """The name that a file of a configuration has for a key: some have two."""
    other = getattr(model.config, "attribute_map", {}).get(key, key)
    return other if key not in config and other in config else key
