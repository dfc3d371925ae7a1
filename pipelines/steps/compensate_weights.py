"""Step `compensate_weights`: what stays of a model makes up for the groups that went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow as pa
from pydantic import Field

from ...errors import InputError
from ...storage import Table, TableWriter
from ..compression.model_tables import MODEL_STEPS, attach_model, model_folder, model_source
from ..compression.tables import COMPRESSED
from ..compression.work import alone, unfinished_model, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole
from ..models import resolved_causal

_CODES = "codes-"


class CompensateWeightsOptions(StepOptions):
    """Options of `compensate_weights`.

    Attributes
    ----------
    model
        The dense model: folder or hub id; the input `dense` where not given.
    compensate
        bias: the mean of what was removed is added to the output's bias (FLAP); refit: the matrix
        that reads the groups is fitted again; auto: bias where the architecture has one there,
        else refit, and a model without removed groups is handed on as it is.
    damping
        Ridge of a refit, as a share of the gram's mean diagonal.
    """

    model: str | None = None
    compensate: Literal["bias", "refit", "auto"] = "auto"
    damping: float = Field(default=0.01, ge=0, le=1)


def plan(
    options: CompensateWeightsOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards: the layers follow one another.

    Raises InputError where statistics or compressed model are of another dense model, or the
    model's weights are quantised already.
    """
    source = model_source(options.model, inputs.get("dense"))
    digest = resolved_causal(source).sha256
    for name in ("model", "statistics"):
        found = inputs[name].manifest
        if found.models.get("model") != digest:
            raise InputError(
                f"`{found.name}` was made from the model {found.models.get('model', '')[:16]}, and"
                f" {source} is {digest[:16]}. Give the dense model that both were made from."
            )
    table = inputs["model"].manifest
    quantised = any(item["name"].startswith(_CODES) for item in table.attachments)
    if quantised and not _as_it_is(options, inputs["model"]):
        raise InputError(
            f"`{table.name}`: expected weights that are not quantised; found codes. Compensate"
            " first, then quantise."
        )
    identity = options.model_dump(exclude={"model"})
    return Plan(COMPRESSED, None, identity, {"model": digest}, payload=source)


def _as_it_is(options: CompensateWeightsOptions, table: Table) -> bool:
    """Whether there is nothing to make up for, and nothing was asked for by name."""
    rows = table.to_table(columns=["unit", "total", "kept"]).to_pylist()
    groups = [row for row in rows if row["unit"] in ("head", "neuron")]
    return options.compensate == "auto" and all(row["kept"] == row["total"] for row in groups)


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Compensate, attach the model's files and write its rows."""
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.compensated_model import CompensatedModel
    from ..compression.statistics import StatisticsTable

    options: CompensateWeightsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    table = job.input("model")
    if _as_it_is(options, table):
        for item in table.manifest.attachments:
            writer.attach(item["name"], table.attachment(item["name"]))
        write_whole(writer, table.to_table())
        return
    made = CompensatedModel(
        StreamedModel(resolved_causal(job.plan.payload).path),
        StreamedModel(model_folder(table)),
        sorted(table.to_table().to_pylist(), key=lambda row: (row["layer"], row["id"])),
        StatisticsTable(job.input("statistics")),
        how=options.compensate,
        damp=options.damping,
    )
    with unfinished_model(work_folder(job.key)) as folder:
        attach_model(writer, made.write(folder))
    write_whole(writer, pa.Table.from_pylist(made.rows, COMPRESSED))


SPEC = StepSpec(
    name="compensate_weights",
    version=1,
    options=CompensateWeightsOptions,
    inputs={
        "model": Slot(("compress_weights",)),
        "statistics": Slot(("weight_statistics",)),
        "dense": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    finish=finish,
    about="What stays of a model makes up for the heads and neurons that went.",
)
