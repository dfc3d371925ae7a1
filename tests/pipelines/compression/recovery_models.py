"""Pruned small models, rows for them, and tables of both, shared by the tests of recovery."""

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from prunery.pipelines.compression.recovery_rows import Rows
from prunery.pipelines.compression.tables import CALIBRATION, COMPRESSED
from prunery.pipelines.engine import write_whole
from prunery.pruners.models.block_layouts import layout_of
from prunery.pruners.models.streamed_model import StreamedModel

from ...tiny_causal import saved_model


def pruned_model(folder, name, *, share=0.5, dtype=torch.float32, **changes):
    """Folder of a random model, half of whose prunable weights are zero."""
    made = saved_model(folder, name, **changes)
    model = StreamedModel(made)
    state = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for layer in range(model.layers):
        names = model.block_names(layer)
        for matrix in layout_of(model.config).matrices(model.block(layer)):
            weight = state[names[f"{matrix.name}.weight"]]
            weight[torch.rand(weight.shape, generator=generator) < share] = 0
    state = {key: value.to(dtype) for key, value in state.items()}
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def pattern_rows(count=24, length=16, seed=0):
    """Rows in which a token tells the next one, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        start, size = int(rng.integers(10, 60)), int(rng.integers(length // 2, length + 1))
        rows.append((start + 3 * np.arange(size)).astype(np.int64))
    ids = np.arange(count, dtype=np.int64) * 7 + 3
    return Rows(ids, rows, [row.copy() for row in rows], "rows")


def rows_table(store, rows, *, name="rows", models=None):
    """The same as a table of calibration_rows."""
    made = [
        {"id": int(id_), "domain": "", "input_ids": tokens, "labels": labels,
         "sources": [int(id_)], "score": None}
        for id_, tokens, labels in zip(rows.ids, rows.input_ids, rows.labels, strict=True)
    ]  # fmt: skip
    with store.write(
        name=name, schema=CALIBRATION, kind="table", step="calibration_rows", version=1,
        options={"name": name}, inputs=[], models=models or {}, seed=0,
    ) as writer:  # fmt: skip
        write_whole(writer, pa.Table.from_pylist(made, CALIBRATION))
        writer.commit()
    return name


def model_table(store, folder, *, name="small", bits=None):
    """A table of compress_weights whose model is that of a folder."""
    row = dict.fromkeys(COMPRESSED.names) | {
        "id": 1, "layer": 0, "module": "mlp.up_proj", "unit": "weight", "total": 10, "kept": 5,
        "bits": bits, "error": 0.25, "note": "",
    }  # fmt: skip
    with store.write(
        name=name, schema=COMPRESSED, kind="table", step="compress_weights", version=1,
        options={"name": name, "bits": bits}, inputs=[], models={}, seed=0,
    ) as writer:  # fmt: skip
        for path in sorted(folder.iterdir()):
            writer.attach(path.name, path)
        write_whole(writer, pa.Table.from_pylist([row], COMPRESSED))
        writer.commit()
    return name
