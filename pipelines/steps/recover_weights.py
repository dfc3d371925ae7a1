"""Step `recover_weights`: a compressed model trained a little; zeros and shapes stay."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from ...errors import InputError, RecipeError
from ...pruners.models.device import pick_device
from ...storage import Table, TableWriter
from ..compression.model_tables import MODEL_STEPS, model_folder, model_source
from ..compression.tables import COMPRESSED
from ..compression.work import alone, unfinished_model, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole
from ..models import resolved_causal

# Learning rates that lowered the held-out loss most on a small Llama with half its weights zero.
_RATES = {
    "bias_norm": 1e-2,
    "mask_lora": 3e-3,
    "lora": 3e-3,
    "distil": 3e-3,
    "layerwise": 1e-2,
}


class RecoverWeightsOptions(StepOptions):
    """Options of `recover_weights`.

    Attributes
    ----------
    method
        bias_norm: biases and norms alone. mask_lora: low-rank updates that leave zeros at zero,
        folded in. lora: the same, with `keep_zeros` to choose. distil: as lora, towards the
        targets of the input `teacher`. layerwise: block by block towards the dense model.
    steps, batch_tokens
        Optimiser steps (in all; of layerwise, for each layer) and padded tokens in each at most.
    learning_rate
        Peak of AdamW's; up over a twentieth of the steps, then a cosine to zero. Where not given:
        0.01 for bias_norm and layerwise, else 0.003. Large models want less (1e-4 to 1e-3).
    rank, alpha
        Of the updates: alpha / rank times a matrix of that rank.
    keep_zeros
        Weights that are zero stay zero; bias_norm and mask_lora cannot do otherwise.
    norms
        Biases and norms are trained beside the updates.
    temperature, distil_weight
        Of distil: (1 - w) NLL + w t² KL, see `compression/teacher.py`.
    evaluations
        How often the held-out rows are asked; the best state is kept.
    held_out
        Share of the rows that is not trained on.
    dense
        Of layerwise: folder or hub id of the dense model; the input `dense` where not given.
    device, dtype
        Where it is computed, and in what numbers products are (weights are float32 meanwhile).
    """

    method: Literal["bias_norm", "mask_lora", "lora", "distil", "layerwise"] = "mask_lora"
    steps: int = Field(default=200, ge=1, le=1_000_000)
    batch_tokens: int = Field(default=2048, ge=2, le=16_777_216)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    rank: int = Field(default=16, ge=1, le=65_536)
    alpha: float = Field(default=32.0, gt=0)
    keep_zeros: bool = True
    norms: bool = True
    temperature: float = Field(default=1.0, gt=0)
    distil_weight: float = Field(default=0.5, ge=0, le=1)
    evaluations: int = Field(default=8, ge=1, le=10_000)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    dense: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


def plan(options: RecoverWeightsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards: training is one piece, done by `finish`."""
    method = options.method
    if not options.keep_zeros and method in ("bias_norm", "mask_lora"):
        raise RecipeError(
            f"recover_weights: {method} leaves zeros at zero; found `keep_zeros: false`. Take lora"
            " or distil, or leave the option out."
        )
    if (method == "distil") != ("teacher" in inputs):
        raise RecipeError(
            "recover_weights: expected the method distil and the input `teacher` (teacher_logits)"
            f" together; found method {method} {'without' if method == 'distil' else 'with'} it."
        )
    wanted, given = method == "layerwise", options.dense is not None or "dense" in inputs
    if wanted != given:
        raise RecipeError(
            "recover_weights: expected the method layerwise and a dense model (the option or input"
            f" `dense`) together; found method {method} {'without' if wanted else 'with'} it."
        )
    _check_tokens(inputs)
    models = {"model": resolved_causal(model_source(None, inputs["model"])).sha256}
    source = None
    if wanted:
        source = model_source(options.dense, inputs.get("dense"))
        models["dense"] = resolved_causal(source).sha256
    identity = options.model_dump(exclude={"dense", "device", "learning_rate"})
    identity["learning_rate"] = options.learning_rate or _RATES[method]
    notes: dict[str, Any] = {"model": inputs["model"].manifest.name, "method": method}
    return Plan(COMPRESSED, None, identity, models, payload=source, notes=notes)


def _check_tokens(inputs: Mapping[str, Table]) -> None:
    """Rows, teacher and model go by the same tokenizer, where they name one."""
    rows = inputs["rows"].manifest
    wanted = resolved_causal(model_source(None, inputs["model"])).tokenizer_sha256
    if rows.models.get("tokenizer", wanted) != wanted:
        raise InputError(
            f"`{rows.name}` was made with the tokenizer {rows.models['tokenizer'][:16]}, and the"
            f" model has {wanted[:16]}. Make the rows with the model's own tokenizer."
        )
    if "teacher" in inputs and inputs["teacher"].manifest.models.get("tokenizer", wanted) != wanted:
        raise InputError(
            f"`{inputs['teacher'].manifest.name}` is of a teacher with another tokenizer than the"
            " model. Take the dense model that was compressed as teacher."
        )


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Train, then attach the model's files and write its rows.

    A run that is stopped leaves nothing; the next one trains from the start, to the same bytes.
    """
    from ..compression.model_tables import attach_model
    from ..compression.recovery import recover
    from ..compression.recovery_rows import read_rows
    from ..compression.recovery_settings import Settings
    from ..compression.teacher import TeacherTable
    from ..compression.whole_model import WholeModel

    options: RecoverWeightsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    table, device = job.input("model"), pick_device(options.device)
    source = model_folder(table)
    model = WholeModel(source, device=device)
    pad, mask = _marks(source, model.causal)
    if options.method == "distil" and not model.causal:
        raise InputError(
            f"`{table.manifest.name}`: expected a causal model for distil; found a masked one"
            f" ({model.source.config.model_type}). Take bias_norm, mask_lora, lora or layerwise."
        )
    work = work_folder(job.key)
    try:
        made = recover(
            model,
            read_rows(job.input("rows"), model.vocabulary, model.longest),
            Settings(
                method=options.method,
                bfloat16=options.dtype == "bfloat16",
                learning_rate=options.learning_rate or _RATES[options.method],
                **options.model_dump(
                    exclude={"method", "dense", "device", "dtype", "learning_rate"}
                ),
            ),
            seed=job.seed,
            work=work,
            frozen=quantised_names(table, source),
            teacher=TeacherTable(job.input("teacher")) if job.has("teacher") else None,
            dense=_dense(job, device),
            pad=pad,
            mask=mask,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if made.changed:
        with unfinished_model(work) as folder:
            attach_model(writer, _files(model, made.changed, folder))
    else:
        for path in sorted(source.iterdir()):
            writer.attach(path.name, path)
    job.plan.notes["recovery"] = made.figures  # type: ignore[index]  # a dict that `plan` made
    write_whole(writer, _rows(table, options.method, given_back=not made.changed))


def _dense(job: Job, device: str) -> Any:
    from ...pruners.models.streamed_model import StreamedModel

    if job.plan.payload is None:
        return None
    return StreamedModel(resolved_causal(job.plan.payload).path, device=device)


def _marks(folder: Path, causal: bool) -> tuple[int, int | None]:
    """Ids of the padding and, of a masked model, of the mask token."""
    from ...pruners.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if causal:
        return int(pad), None
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"{folder}: expected a tokenizer with a mask token, which a masked model is trained"
            " with; found none. Add one to tokenizer_config.json of the source model."
        )
    return int(pad), int(tokenizer.mask_token_id)


def quantised_names(table: Table, folder: Path) -> frozenset[str]:
    """Names in the files of the weights that are quantised: they have codes in a file beside.

    Raises InputError where a row speaks of bits and no file holds codes.
    """
    from safetensors import safe_open

    found = set()
    for path in sorted(folder.glob("codes-*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                found.add(f"{name.rpartition('.')[0]}.weight")
    bits = table.to_table(["bits"]).column("bits")
    if not found and bits.null_count < len(bits):
        raise InputError(
            f"`{table.manifest.name}`: expected the codes of its quantised weights beside them;"
            " found none. Make compress_weights again."
        )
    return frozenset(found)


def _files(model: Any, changed: Mapping[str, Any], folder: Path) -> list[Path]:
    """The recovered model's files, and what else the source has beside its weights."""
    from ...pruners.models.encoders import weight_files

    written = model.write(folder, changed)
    source = model.source.folder
    known = {path.name for path in written} | {path.name for path in weight_files(source)}
    for path in sorted(source.iterdir()):
        if path.name not in known:
            shutil.copyfile(path, folder / path.name)
            written.append(folder / path.name)
    return sorted(written)


def _rows(table: Table, method: str, *, given_back: bool) -> pa.Table:
    """The source's rows; their notes say what was done since."""
    rows = table.to_table(COMPRESSED.names).to_pylist()
    said = f"{method}: no better on held-out rows, given back as it was"
    if not given_back:
        said = f"recovered by {method}; the error is from before"
    for row in rows:
        row["note"] = f"{row['note']}; {said}" if row["note"] else said
    return pa.Table.from_pylist(rows, COMPRESSED)


SPEC = StepSpec(
    name="recover_weights",
    version=1,
    options=RecoverWeightsOptions,
    inputs={
        "model": Slot(MODEL_STEPS),
        "rows": Slot(("calibration_rows",)),
        "teacher": Slot(("teacher_logits",), optional=True),
        "dense": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    finish=finish,
    about="A compressed model trained a little, its zeros and shapes as they were.",
)
