"""Step `verify_compression`: what a compressed model lost, against the dense one and a control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import InputError, RecipeError
from ...pruners.models.device import pick_device
from ...storage import Table, TableWriter
from ..compression.verify_tables import COMPRESSED_STEPS, SPEED_FILE, VERIFY
from ..compression.work import alone, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole

_SAME_SHARE = 0.02  # how far the control's kept share may be from the model's
_IGNORED = -100


class VerifyCompressionOptions(StepOptions):
    """Options of `verify_compression`.

    Attributes
    ----------
    dense
        Folder or hub id of the model before compression; not wanted where the input `dense`
        brings it.
    control
        "table": the input `control` is a model of a random method at the same budget. "none":
        go without, which has to be said (quantisation alone has no random counterpart).
    dtype
        How the model will be stored: what is judged is what is exported.
    targets
        "labels": what the rows' labels train. "all": every token.
    tolerance
        Rise of the perplexity that is accepted, as a share; the noise floor where it is larger.
    tasks, task_limit, task_folder, task_tolerance
        Tasks of lm-evaluation-harness, rows of each at most, a folder of tasks of your own, and
        the drop of a task's score that is accepted.
    resamples
        Bootstrap resamples of the rows, for the noise floor.
    mask_share, mask_token
        Of an encoder: share of a row's targets that is masked, and the mask's id where the
        tokenizer has none.
    batch_tokens
        Padded tokens of a batch, at most.
    speed, prompt, new, repeats
        Whether speed and memory are measured in a fresh process, with what lengths, how often.
        They are attached as `speed.json`: no two runs measure the same, and rows stay the same.
    device
        Such as cuda; None is the GPU where there is one.
    """

    paths: ClassVar[tuple[str, ...]] = ("task_folder",)

    dense: str | None = None
    control: Literal["table", "none"] = "table"
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    targets: Literal["labels", "all"] = "labels"
    tolerance: float = Field(default=0.1, ge=0)
    tasks: list[str] = Field(default_factory=list)
    task_limit: int | None = Field(default=None, ge=1)
    task_folder: str | None = None
    task_tolerance: float = Field(default=0.02, ge=0)
    resamples: int = Field(default=200, ge=20, le=100_000)
    mask_share: float = Field(default=0.15, gt=0, le=0.5)
    mask_token: int | None = Field(default=None, ge=0)
    batch_tokens: int = Field(default=2048, ge=8)
    speed: bool = True
    prompt: int = Field(default=128, ge=1)
    new: int = Field(default=32, ge=1)
    repeats: int = Field(default=3, ge=1)
    device: str | None = None


def plan(
    options: VerifyCompressionOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards of its own: models are judged together, by `finish`."""
    if "control" not in inputs and options.control != "none":
        raise RecipeError(
            "verify_compression: expected the input `control`, a model compressed by a random"
            " method at the same budget; found none. Add such a compress_weights step and name it"
            " under `inputs`, or say `control: none`."
        )
    if "control" in inputs and options.control == "none":
        raise RecipeError(
            "verify_compression: expected either the input `control` or `control: none`, found"
            " both. Remove one."
        )
    from ...pruners.models.language import resolve_language
    from ..compression.model_tables import model_source

    source = model_source(options.dense, inputs.get("dense"))
    found = resolve_language(source, "causal")
    identity = options.model_dump(exclude={"dense", "task_folder", "device"})
    return Plan(VERIFY, None, identity, {"dense": found.sha256}, payload=str(found.path))


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Judge the models and write a row for each; sizes and speeds stand in attachments."""
    from ..compression.gate import same_budget
    from ..compression.verify import Candidate, VerifyPlan, verify

    options: VerifyCompressionOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    rows = _rows(job, options)
    control = None
    if job.has("control"):
        ours, theirs = (job.input(role).to_table().to_pylist() for role in ("model", "control"))
        same_budget(ours, theirs, _SAME_SHARE)
        control = Candidate(*_packed(job, "control", options))
    names = set(VerifyPlan.__dataclass_fields__) & set(VerifyCompressionOptions.model_fields)
    shared = options.model_dump(include=names - {"device"})
    device = pick_device(options.device)
    made = verify(
        Path(job.plan.payload),
        Candidate(*_packed(job, "model", options)),
        control,
        rows,
        work_folder(job.key),
        VerifyPlan(**shared, device=device, threads=job.threads, seed=job.seed),
    )
    writer.attach("sizes.json", json.dumps(made.sizes.to_dict(), indent=1).encode())
    speeds = {role: asdict(speed) for role, speed in made.speeds.items()}
    writer.attach(SPEED_FILE, json.dumps(speeds, indent=1).encode())
    write_whole(writer, pa.Table.from_pylist(made.rows, VERIFY))


def _packed(job: Job, role: str, options: VerifyCompressionOptions) -> tuple[str, Path, Any]:
    from ..compression.export import pack_options

    table = job.input(role)
    return table.manifest.name, *pack_options(table, options.dtype, Path(job.plan.payload))


def _rows(job: Job, options: VerifyCompressionOptions) -> Any:
    """The evaluation rows; none of what they come from may have been calibrated on."""
    from ..compression.quality import Rows

    table = job.input("rows").to_table(columns=["id", "input_ids", "labels", "sources"])
    if job.has("calibration"):
        _held_out(table, job.input("calibration").to_table(columns=["sources"]))
    tokens = [np.array(ids, np.int64) for ids in table.column("input_ids").to_pylist()]
    targets = [
        np.array(labels, np.int64) != _IGNORED
        if options.targets == "labels"
        else np.ones(len(labels), np.bool_)
        for labels in table.column("labels").to_pylist()
    ]
    return Rows(table.column("id").to_numpy(), tokens, targets)


def _held_out(rows: pa.Table, calibration: pa.Table) -> None:
    seen, used = (
        {source for sources in table.column("sources").to_pylist() for source in sources}
        for table in (rows, calibration)
    )
    if seen & used:
        raise InputError(
            f"rows: expected evaluation rows that the model was not calibrated on; found"
            f" {len(seen & used)} of {len(seen)} sources in both (such as {min(seen & used)})."
            " Make them with `part: evaluation` and the calibration with `part: calibration`."
        )


SPEC = StepSpec(
    name="verify_compression",
    version=2,
    options=VerifyCompressionOptions,
    inputs={
        "model": Slot(COMPRESSED_STEPS),
        "rows": Slot(("calibration_rows",)),
        "dense": Slot(("train_lm",), optional=True),
        "control": Slot(COMPRESSED_STEPS, optional=True),
        "calibration": Slot(("calibration_rows",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="What a compressed model lost, against the dense one and a control, and a verdict.",
)
