"""Models of the compression stage made by hand: quantised folders, tables of models and of rows."""

import json
import shutil

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from prunery.pipelines.compression.model_tables import attach_model
from prunery.pipelines.compression.tables import CALIBRATION, COMPRESSED

BLOCK_WORDS = (".layers.", ".layer.", ".h.")


def matrices(folder):
    """Names of the matrices inside the layers, routers left out."""
    tensors = load_file(folder / "model.safetensors")
    return [
        name
        for name, tensor in tensors.items()
        if tensor.dim() == 2
        and any(word in name for word in BLOCK_WORDS)
        and not name.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "moe.gate.weight"))
    ]


def quantise(folder, bits, group=0, *, symmetric=True, transposed=False, seed=0):
    """Round a folder's matrices to a grid in place; codes beside them. `bits` may be by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors, codes = load_file(folder / "model.safetensors"), {}
    for name in matrices(folder):
        width = bits(name) if callable(bits) else bits
        weight = tensors[name].T if transposed else tensors[name]
        rows, inputs = weight.shape
        size = group or inputs
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        grouped = weight.reshape(rows, -1, size)
        scale = (grouped.abs().amax(-1) / high).clamp_min(1e-8)
        zero = torch.zeros_like(scale)
        if not symmetric:
            zero = torch.randint(-2, 2, scale.shape, generator=generator).float().clamp(low, high)
        rounded = (grouped / scale[..., None] + zero[..., None]).round().clamp(low, high)
        dense = ((rounded - zero[..., None]) * scale[..., None]).reshape(rows, inputs)
        tensors[name] = (dense.T if transposed else dense).contiguous()
        bare = name.removesuffix(".weight")
        codes[f"{bare}.codes"] = rounded.reshape(rows, inputs).to(torch.int8).contiguous()
        codes[f"{bare}.scale"] = scale.contiguous()
        if not symmetric:
            codes[f"{bare}.zero"] = zero.to(torch.int8).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(codes, folder / "codes-00000.safetensors")
    return folder


def pruned(folder, to, keep, *, seed=0):
    """A copy of a folder with a share of every matrix's weights set to 0, the smallest first.

    `seed` None takes magnitudes; else they go at random.
    """
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    rng = np.random.default_rng(seed)
    for name in matrices(to):
        weight = tensors[name]
        score = weight.abs() if seed is None else torch.from_numpy(rng.random(weight.shape))
        drop = weight.numel() - round(keep * weight.numel())
        flat = weight.flatten().clone()
        flat[score.flatten().argsort(stable=True)[:drop]] = 0
        tensors[name] = flat.reshape(weight.shape)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def compressed_rows(layers, keep, *, bits=None, unit="weight", error=0.1):
    return [
        {
            "id": 10 * layer + place,
            "layer": layer,
            "module": module,
            "unit": unit,
            "total": 1000,
            "kept": round(1000 * keep),
            "bits": bits,
            "group_size": None,
            "error": error * (1 + layer),
            "positions": None,
            "note": "",
            "seconds": 0.1,
        }
        for layer in range(layers)
        for place, module in enumerate(("self_attn.q_proj", "mlp.up_proj"))
    ]


def compressed_table(store, folder, rows, *, name="model", step="compress_weights", inputs=()):
    """Key of a table of a compressed model; the folder stays."""
    options = {"method": "magnitude", "options": {"seed_of": name}}
    with store.write(
        name=name, step=step, schema=COMPRESSED, options=options, inputs=inputs
    ) as writer:
        copy = folder.with_name(f"{folder.name}-{name}-attached")
        shutil.copytree(folder, copy)
        attach_model(writer, sorted(path for path in copy.iterdir() if path.is_file()))
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(rows, COMPRESSED))
        return writer.commit().key


def rows_table(store, count=12, longest=24, *, name="rows", seed=0, ignored=0, tokens=None):
    """Key of a table of calibration rows; the first `ignored` labels of each are -100."""
    rng = np.random.default_rng(seed)
    if tokens is None:
        tokens = [rng.integers(3, 300, rng.integers(4, longest)) for _ in range(count)]
    made = []
    for number, ids in enumerate(tokens):
        labels = ids.astype(np.int64)
        labels[:ignored] = -100
        row = {"id": number, "domain": "ab"[number % 2], "input_ids": ids, "labels": labels}
        made.append({**row, "sources": [number], "score": None})
    options = {"choice": "random", "seed_of": name}
    with store.write(
        name=name, step="calibration_rows", schema=CALIBRATION, options=options, seed=seed
    ) as writer:
        for number in writer.pending(1):
            with writer.shard(number) as out:
                out.write(pa.Table.from_pylist(made, CALIBRATION))
        return writer.commit().key


def config_of(folder):
    return json.loads((folder / "config.json").read_text())
