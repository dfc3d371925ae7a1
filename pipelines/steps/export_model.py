"""Step `export_model`: a compressed model as the folder that stock transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa

from ...errors import InputError
from ...storage import Table, TableWriter
from ..compression.verify_tables import COMPRESSED_STEPS, EXPORTED
from ..compression.work import alone, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, write_whole


class ExportModelOptions(StepOptions):
    """Options of `export_model`.

    Attributes
    ----------
    path
        Folder to write beside the store, which must not exist; None keeps the model in the
        store alone. It is made when the table is: where the table exists already, `model_folder`
        gives its files.
    dense
        Folder or hub id of the model before compression, for the sizes before; not wanted where
        the input `dense` brings it. Without either, sizes are held against the compressed model
        before packing.
    dtype
        Of what is stored; "source" leaves it.
    anyway
        Export a model that its verdict refuses.
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None
    dense: str | None = None
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    anyway: bool = False


def plan(options: ExportModelOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards; refuses what did not pass its gate before anything is written."""
    if "verify" in inputs:
        from ..compression.export import check_gate

        verdict = inputs["verify"]
        rows = verdict.to_table(columns=["role", "verdict", "reasons"]).to_pylist()
        about = inputs["model"].manifest
        check_gate(about, verdict.manifest, rows, options.dtype, options.anyway)
    models, dense = {}, None
    if options.dense is not None or "dense" in inputs:
        from ...pruners.models.language import resolve_language
        from ..compression.model_tables import model_source

        found = resolve_language(model_source(options.dense, inputs.get("dense")), "causal")
        models["dense"], dense = found.sha256, str(found.path)
    # The folder is part of what the step makes: another one is another export.
    identity = options.model_dump(exclude={"anyway", "dense"})
    return Plan(EXPORTED, None, identity, models, payload=dense)


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Pack the model, attach its files, and put a copy where it was asked for."""
    from ..compression.export import pack_options, size_rows
    from ..compression.model_tables import attach_model
    from ..compression.packing import pack_model

    options: ExportModelOptions = job.options  # type: ignore[assignment]
    target = Path(options.path) if options.path is not None else None
    if target is not None and target.exists():
        raise InputError(
            f"{target}: expected a folder that does not exist yet, found one. Name another under"
            " `path`, or remove it: an export never overwrites."
        )
    dense = Path(job.plan.payload) if job.plan.payload is not None else None
    folder, how = pack_options(job.input("model"), options.dtype, dense)
    packed = work_folder(job.key)
    shutil.rmtree(packed, ignore_errors=True)
    packed.parent.mkdir(parents=True, exist_ok=True)
    report = pack_model(folder, target or packed, how)
    try:
        if target is not None:
            shutil.copytree(target, packed)
        attach_model(writer, sorted(path for path in packed.iterdir() if path.is_file()))
        writer.attach("size-report.json", json.dumps(report.to_dict(), indent=1).encode())
        write_whole(writer, pa.Table.from_pylist(size_rows(report), EXPORTED))
    except BaseException:
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(packed, ignore_errors=True)


SPEC = StepSpec(
    name="export_model",
    version=1,
    options=ExportModelOptions,
    inputs={
        "model": Slot(COMPRESSED_STEPS),
        "verify": Slot(("verify_compression",), optional=True),
        "dense": Slot(("train_lm",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="A compressed model as the folder that stock transformers loads, past its gate.",
)
