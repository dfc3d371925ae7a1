"""Step `compress_weights`: a plan carried out on a model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ...errors import InputError, RecipeError
from ...storage import Table, TableWriter, row_id
from ..compression.apply_options import CompressWeightsOptions
from ..compression.calibration import IGNORED
from ..compression.model_tables import MODEL_STEPS, attach_model, model_source
from ..compression.tables import COMPRESSED
from ..compression.work import alone, remove_work, unfinished_model, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepSpec, use_threads, write_whole
from ..models import resolved_causal

if TYPE_CHECKING:
    from ..compression.compressor import LayerStatistics
    from ..compression.walk import Batch


def plan(
    options: CompressWeightsOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards: layers follow one another, and a journal of layers takes their place."""
    source = model_source(options.model, inputs.get("model"))
    digest = resolved_causal(source).sha256
    planned = inputs["plan"].manifest
    if planned.models.get("model") != digest:
        raise InputError(
            f"`{planned.name}` is a plan for the model {planned.models.get('model', '')[:16]}, and"
            f" {source} is {digest[:16]}. Give both steps the same model."
        )
    identity = options.model_dump(exclude={"model", "device"})
    notes = {"model": options.model or "input", "plan": dict(planned.options)}
    return Plan(COMPRESSED, None, identity, {"model": digest}, payload=source, notes=notes)


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Walk, write the model's files and its rows."""
    from ...pruners.signals.block_statistics import TokenWeights
    from ..compression.apply import compress_layers, compressed_rows, write_compressed
    from ..compression.compressors import make_compressor, open_model
    from ..compression.journal import LayerJournal

    options: CompressWeightsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    table = job.input("plan")
    work = work_folder(job.key)
    model = open_model(job.plan.payload, table.manifest.options, options, work)
    batches = _batches(job, options)
    journal = LayerJournal(work)
    planned = table.to_table().to_pylist()
    compressor = make_compressor(model, table.manifest.options, planned, options, job.seed)
    compress_layers(
        model,
        batches,
        journal,
        compressor,
        planned,
        propagate=options.propagate,
        given=_gradients(job, compressor.wanted),
        weights=TokenWeights(options.token_minimum, options.token_power),
        autocast=options.autocast,
    )
    made = compressed_rows(journal, model.layers)
    with unfinished_model(work) as folder:
        attach_model(writer, write_compressed(model, journal, compressor.config(), folder))
    write_whole(writer, pa.Table.from_pylist([_row(row) for row in made], COMPRESSED))


def _batches(job: Job, options: CompressWeightsOptions) -> Sequence[Batch]:
    from ..compression.walk import batches_of

    rows = job.input("rows").to_table(columns=["input_ids", "labels"]).to_pylist()
    counted = None
    if options.tokens == "trained":
        counted = [[label != IGNORED for label in row["labels"]] for row in rows]
        if not any(any(row) for row in counted):
            raise InputError(
                f"compress_weights: expected tokens with a label in"
                f" `{job.input('rows').manifest.name}` for `tokens: trained`; found none."
            )
    ids = [row["input_ids"] for row in rows]
    return batches_of(ids, tokens=options.tokens_a_batch, counted=counted)


def _gradients(job: Job, wanted: frozenset[str]) -> Callable[[int], LayerStatistics] | None:
    """Gradients by layer from the input `statistics`, where the compressor wants any."""
    from ...pruners.signals.block_statistics import GRADIENT_STATISTICS
    from ..compression.statistics import StatisticsTable

    names = wanted & GRADIENT_STATISTICS
    if not names:
        return None
    if not job.has("statistics"):
        raise RecipeError(
            f"compress_weights: the plan's method needs {', '.join(sorted(names))}. Give the input"
            " `statistics`: a weight_statistics step with these among its `statistics`."
        )
    table = StatisticsTable(job.input("statistics"))

    def read(layer: int) -> LayerStatistics:
        return {
            key: array
            for key, array in table.layer(layer).items()
            if key[1] in names or key[1] == "gradient_rows"
        }

    return read


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row_id("compress_weights", row["layer"], row["module"], row["unit"]), **row}


SPEC = StepSpec(
    name="compress_weights",
    version=2,
    options=CompressWeightsOptions,
    inputs={
        "plan": Slot(("plan_compression",)),
        "rows": Slot(("calibration_rows",)),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
        "statistics": Slot(("weight_statistics",), optional=True),
    },
    plan=plan,
    finish=finish,
    cleanup=remove_work,
    about="A plan carried out on a model, layer by layer.",
)
