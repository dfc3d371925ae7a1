"""Step `weight_statistics`: what passes through every layer of a model, summed over rows.

The expensive part of compressing a model, done once: every method and budget decides from here.
One block is in memory at a time. Parts of the rows are shards, which processes and machines can
share; a shard that is killed goes on at the layer where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ...errors import InputError
from ...pruners.models.device import pick_device
from ...storage import Table
from ..compression.model_tables import MODEL_STEPS, model_source
from ..compression.tables import STATISTICS
from ..compression.work import remove_work, working
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import resolved_causal
from ..tables import shard_ranges

if TYPE_CHECKING:
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.gradients import GradientPass
    from ..compression.journal import LayerJournal

Statistic = Literal[
    "sum_squares",
    "mean",
    "m2",
    "gram",
    "weighted_gram",
    "angle",
    "cosine",
    "attention",
    "expert_tokens",
    "expert_gate",
    "expert_norm",
    "expert_reap",
    "expert_easy",
    "gradient",
    "gradient_square",
    "gradient_abs",
]
SHORTEST = 2
Ints = npt.NDArray[np.int32]


class WeightStatisticsOptions(StepOptions):
    """Options of `weight_statistics`.

    Attributes
    ----------
    model
        Folder, hub id, or None for the input `model`.
    statistics
        Of what enters a matrix: `sum_squares` (Wanda), `mean` and `m2` (FLAP), `gram`
        (SparseGPT, GPTQ, refits), `weighted_gram` (RSQ). Of a block: `angle`, `cosine` (layer
        importance). `attention` that positions receive. Of experts: `expert_tokens`,
        `expert_gate`, `expert_norm`, `expert_reap`, `expert_easy`. Of the loss, with a pass back:
        `gradient`, `gradient_square`, `gradient_abs` (GBLM, LLM-Pruner). Counts come along.
        Definitions stand in pruners/signals/block_statistics.py. On disk a vector of the inputs
        (`sum_squares`, `mean`, `m2`, `expert_*`) is cheap: 3 MB each of a Llama of 7B. `gram` and
        `weighted_gram` are inputs x inputs of every matrix, 22 GB each of such a model; each
        `gradient*` is as large as the weights in float32, 26 GB. SparseGPT and GPTQ make their
        own in `compress_weights`, a layer at a time, and need no table of them.
    tokens_a_batch
        Padded tokens in a batch at most; a longer row goes alone. It decides the shapes of
        matrix products, and so the last bits of the numbers.
    parts
        Shards that the rows are cut into, each a walk through the whole model.
    r_min, power
        Of `weighted_gram`: least weight of a token before scaling, and the power of the weights.
    device, dtype
        Of the blocks. `dtype` changes numbers and enters the key, `device` does not.
    """

    model: str | None = None
    statistics: list[Statistic] = Field(
        default=["sum_squares", "mean", "m2", "angle", "cosine"], min_length=1
    )
    tokens_a_batch: int = Field(default=2048, ge=1)
    parts: int = Field(default=1, ge=1, le=10_000)
    r_min: float = Field(default=0.005, ge=0, le=1)
    power: Literal[1, 2] = 1
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def plan(
    options: WeightStatisticsOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """A shard for each part of the rows; the digest of the model in the key.

    Raises
    ------
    InputError
        There are no rows, or gradients are asked of a masked language model.
    ModelError
        The model is not found, or its architecture is unknown.
    """
    from ...pruners.models.block_layouts import layout_of
    from ...pruners.models.streamed_model import read_config

    table = inputs["rows"]
    found = resolved_causal(model_source(options.model, inputs.get("model")))
    layout = layout_of(read_config(found.path))
    statistics = sorted(set(options.statistics))
    if layout.head != "causal" and any(name.startswith("gradient") for name in statistics):
        raise InputError(
            f"weight_statistics: expected a causal language model for the gradient statistics;"
            f" {found.path} is a masked one. Leave them out."
        )
    if table.num_rows == 0:
        raise InputError(
            f"weight_statistics: expected calibration rows in `{table.manifest.name}`"
            f" ({table.key[:12]}), found none. Choose at least one row."
        )
    size = -(-table.num_rows // options.parts)
    ranges = shard_ranges(table.num_rows, size)
    identity = {
        "statistics": statistics,
        "tokens_a_batch": options.tokens_a_batch,
        "rows_a_part": size,
        "dtype": options.dtype,
    }
    if "weighted_gram" in statistics:
        identity |= {"r_min": options.r_min, "power": options.power}
    return Plan(
        STATISTICS,
        len(ranges),
        identity,
        {"model": found.sha256},
        payload=(str(found.path), ranges),
        notes={"model": options.model or "input", "rows": table.num_rows, "parts": len(ranges)},
    )


def shard(job: Job, index: int, out: Rows) -> None:
    """Walk through the model with one part of the rows, and write its layers."""
    with working(job.key, index) as folder:
        _shard(job, index, out, folder)


def _shard(job: Job, index: int, out: Rows, folder: Path) -> None:
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.journal import LayerJournal
    from ..compression.statistics import keyed, statistics_rows

    options: WeightStatisticsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    source, ranges = job.plan.payload
    start, stop = ranges[index]
    wanted = frozenset(job.plan.identity["statistics"])
    model = StreamedModel(source, device=pick_device(options.device), dtype=options.dtype)
    rows = _rows(job.input("rows"), start, stop, model.config)
    journal = LayerJournal(folder / "statistics")
    _walk(model, rows, journal, wanted, options)
    gradients = _gradients(model, rows, folder / "gradients", wanted)
    written, walked = 0, journal.done() > 0
    for layer in range(model.layers):
        found = keyed(journal.tensors(layer)) if walked else {}
        found |= gradients.layer(layer) if gradients is not None else {}
        for made in statistics_rows(index, layer, found):
            out.write(made)
            written += made.num_rows
    out.count(written, {})
    # Of a shard that is done, the layers stay until the table is committed; the rest is large.
    for path in folder.rglob("hidden-*.safetensors"):
        path.unlink()


def _walk(
    model: StreamedModel,
    rows: Sequence[Ints],
    journal: LayerJournal,
    wanted: frozenset[str],
    options: WeightStatisticsOptions,
) -> None:
    from ...pruners.signals.block_statistics import FORWARD_STATISTICS, TokenWeights
    from ..compression.statistics import layer_statistics, named
    from ..compression.walk import LayerVisit, Made, batches_of, walk

    weights = TokenWeights(options.r_min, options.power)
    pad = model.config.pad_token_id
    batches = batches_of(rows, tokens=options.tokens_a_batch, pad=pad if pad is not None else 0)

    def visit(here: LayerVisit) -> Made:
        return named(layer_statistics(here, wanted, weights=weights)), []

    if wanted & FORWARD_STATISTICS:
        walk(model, batches, journal, visit)


def _gradients(
    model: StreamedModel, rows: Sequence[Ints], folder: Any, wanted: frozenset[str]
) -> GradientPass | None:
    from ...pruners.signals.block_statistics import GRADIENT_STATISTICS
    from ..compression.gradients import GradientPass

    if not wanted & GRADIENT_STATISTICS:
        return None
    made = GradientPass(model, rows, folder, wanted)
    made.run()
    return made


def _rows(table: Table, start: int, stop: int, config: Any) -> list[Ints]:
    """Token ids of the rows [start, stop), each fit for the model.

    Raises InputError naming the first row that is too short or too long for the model, or holds
    an id that it does not know.
    """
    made: list[Ints] = []
    place = 0
    for batch in table.batches(columns=["id", "input_ids"]):
        first, last = max(start - place, 0), min(stop - place, batch.num_rows)
        place += batch.num_rows
        for at in range(first, last):
            ids = batch.column("input_ids")[at].values.to_numpy(zero_copy_only=False)
            where = f"row {batch.column('id')[at].as_py()} of `{table.manifest.name}`"
            _check_row(ids, where, config)
            made.append(ids.astype(np.int32))
    return made


def _check_row(ids: npt.NDArray[Any], where: str, config: Any) -> None:
    window = getattr(config, "max_position_embeddings", None)
    size = int(config.vocab_size)
    if len(ids) < SHORTEST:
        raise InputError(
            f"{where}: expected at least {SHORTEST} tokens to calibrate on; found {len(ids)}."
            " Choose longer rows (`shortest` of calibration_rows)."
        )
    if window is not None and len(ids) > window:
        raise InputError(
            f"{where}: expected at most {window} tokens, the model's window; found {len(ids)}."
            " Lower `length` of calibration_rows."
        )
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InputError(
            f"{where}: expected token ids from 0 to {size - 1}; found {bad}. Tokenise with the"
            " tokenizer of the model that is calibrated."
        )


SPEC = StepSpec(
    name="weight_statistics",
    version=1,
    options=WeightStatisticsOptions,
    inputs={
        "rows": Slot(("calibration_rows",)),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    shard=shard,
    cleanup=remove_work,
    about="What passes through every layer of a model, summed over calibration rows.",
)
