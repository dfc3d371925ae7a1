"""Step `activation_thresholds`: under which size activations may be left out, and what it costs.

The thresholds are attached as `activation_thresholds.safetensors`; beside an exported model they
are put in force by `prunery.pruners.models.sparse_activation`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from ...errors import InputError, ModelError
from ...pruners.models.device import pick_device
from ...storage import Table, TableWriter, row_id
from ..compression.model_tables import MODEL_STEPS, model_source
from ..compression.work import alone, remove_work, work_folder
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole
from ..models import resolved_causal

if TYPE_CHECKING:
    from ...pruners.models.sparse_activation import Thresholds
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.activation import Evaluation

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        # -1, with the module "" and the kind "model", for what concerns the whole model.
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("module", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # input, alone, gate: see Site
        pa.field("thresholds", pa.list_(pa.float32()), nullable=False),  # one, or one a neuron
        # Share of the numbers at or under the threshold that was asked for; null for ppl_p.
        pa.field("sparsity", pa.float32()),
        # Share of the numbers that lived over the rows judged on, all thresholds in force.
        pa.field("live", pa.float32(), nullable=False),
        # Of the whole model: mean loss of the targets in nats, dense and with thresholds.
        pa.field("dense_loss", pa.float32()),
        pa.field("sparse_loss", pa.float32()),
        pa.field("cett", pa.float32()),  # of ppl_p, the same for all layers
    ]
)
_SEARCH, _JUDGE = 0, 1


class ActivationThresholdsOptions(StepOptions):
    """Options of `activation_thresholds`.

    Attributes
    ----------
    method
        cats: |act(gate)|, one threshold a layer. chess: the same with one a neuron, and the
        inputs of query and output. teal: the inputs of every matrix. ppl_p: whole neurons by
        what they add to the output, as many as `p` allows; the sparsity it reports is a measure
        of how sparse the model is by itself.
    sparsity
        Share of the numbers to leave out where thresholds are found; not of ppl_p.
    p
        Of ppl_p: the rise of perplexity that is allowed, in percent.
    levels, step
        Of teal: uniform, or greedy within each block by steps.
    grid, rounds
        Of ppl_p: thresholds measured in each layer, and halvings of the common CETT; each is a
        walk through the model over the rows judged on.
    model
        Folder or hub id; the input `model` where not given.
    tokens_a_batch
        Padded tokens in a batch at most.
    device, dtype
        Where it is computed (a GPU where there is one, unless told), and in what numbers.
    """

    method: Literal["cats", "chess", "teal", "ppl_p"] = "cats"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    p: float = Field(default=1.0, ge=0, le=1000)
    levels: Literal["uniform", "greedy"] = "uniform"
    step: float = Field(default=0.1, gt=0, le=0.5)
    grid: int = Field(default=64, ge=1, le=1024)
    rounds: int = Field(default=7, ge=0, le=30)
    model: str | None = None
    tokens_a_batch: int = Field(default=4096, ge=1)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def used(self) -> dict[str, Any]:
        """The options that the method looks at: they enter the key."""
        names = {"method", "tokens_a_batch", "dtype"}
        names |= {"p", "grid", "rounds"} if self.method == "ppl_p" else {"sparsity"}
        if self.method == "teal":
            names |= {"levels", "step"} if self.levels == "greedy" else {"levels"}
        return self.model_dump(include=names)


def plan(
    options: ActivationThresholdsOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards: layers follow one another.

    Raises
    ------
    ModelError
        An encoder, a mixture of experts, or cats and chess without a gated MLP.
    InputError
        No rows.
    """
    from ...pruners.models.block_layouts import layout_of
    from ...pruners.models.sparse_activation import refuse_unfit
    from ...pruners.models.streamed_model import read_config
    from ..compression.activation import GATED

    source = model_source(options.model, inputs.get("model"))
    found = resolved_causal(source)
    config = read_config(found.path)
    layout = layout_of(config)
    if layout.head != "causal":
        raise ModelError(
            f"activation_thresholds: expected a causal language model, whose perplexity can be"
            f" told; found {config.model_type}."
        )
    refuse_unfit(layout, config.model_type, options.method in GATED)
    for role in ("rows", "evaluation"):
        if role in inputs and not inputs[role].num_rows:
            raise InputError(
                f"`{inputs[role].manifest.name}` holds no rows. Give calibration_rows some."
            )
    notes = {"model": options.model or "input", "judged_on": _judged(inputs)}
    return Plan(
        SCHEMA,
        None,
        options.used(),
        {"model": found.sha256},
        payload=(str(found.path), int(config.vocab_size)),
        notes=notes,
    )


def _judged(inputs: Mapping[str, Table]) -> str:
    return inputs["evaluation" if "evaluation" in inputs else "rows"].manifest.name


@alone
def finish(job: Job, writer: TableWriter) -> None:
    """Find the thresholds, judge them beside the dense model, attach and write."""
    from ...pruners.models.sparse_activation import save_thresholds
    from ...pruners.models.streamed_model import StreamedModel
    from ..compression.activation import ThresholdSearch, find_thresholds, thresholds_of
    from ..compression.journal import LayerJournal
    from ..compression.walk import batches_of

    options: ActivationThresholdsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    folder, vocabulary = job.plan.payload
    model = StreamedModel(folder, device=pick_device(options.device), dtype=options.dtype)
    rows, _ = _rows(job.input("rows"), vocabulary)
    batches = batches_of(rows, tokens=options.tokens_a_batch)
    journal = LayerJournal(work_folder(job.key, _SEARCH))
    search = ThresholdSearch(
        method=options.method,
        sparsity=options.sparsity,
        levels=options.levels,
        step=options.step,
        grid=options.grid,
    )
    find_thresholds(model, batches, journal, search)
    judge = _Judge(job, model, vocabulary)
    dense = judge({})
    cett = None
    if options.method == "ppl_p":
        cett = judge.largest_cett(journal, dense, options)
    thresholds = thresholds_of(journal, model.layers, cett)
    sparse = judge(thresholds)
    shares = {
        (layer, row["module"], row["kind"]): row["share"]
        for layer in range(model.layers)
        for row in journal.rows(layer)
    }
    with tempfile.TemporaryDirectory(prefix="prunery-thresholds-") as made:
        path = save_thresholds(made, thresholds)
        writer.attach(path.name, path)
    table = [_whole(options, dense, sparse, cett), *_places(thresholds, sparse, shares)]
    write_whole(writer, pa.Table.from_pylist(table, SCHEMA))


class _Judge:
    """The model's loss over the rows judged on, under some thresholds."""

    def __init__(self, job: Job, model: StreamedModel, vocabulary: int) -> None:
        from ..compression.walk import batches_of

        options: ActivationThresholdsOptions = job.options  # type: ignore[assignment]
        table = job.input("evaluation" if job.has("evaluation") else "rows")
        rows, self._labels = _rows(table, vocabulary)
        self._batches = batches_of(rows, tokens=options.tokens_a_batch)
        self._model = model
        self._folder: Path = work_folder(job.key, _JUDGE)

    def __call__(self, thresholds: Thresholds) -> Evaluation:
        from ..compression.activation import evaluate

        return evaluate(self._model, self._batches, self._labels, self._folder, thresholds)

    def largest_cett(
        self, journal: Any, dense: Evaluation, options: ActivationThresholdsOptions
    ) -> float:
        """The largest CETT found that is within p percent of the dense perplexity."""
        from ...pruners.weight.activation import largest_cett
        from ..compression.activation import thresholds_of

        def ratio(cett: float) -> float:
            found = self(thresholds_of(journal, self._model.layers, cett))
            return math.exp(min(found.loss - dense.loss, 700.0))

        return largest_cett(ratio, 1 + options.p / 100, options.rounds)[0]


def _rows(table: Table, vocabulary: int) -> tuple[list[Any], list[Any]]:
    """Token ids and labels of each row.

    Raises InputError for a row of fewer than 2 tokens, or of ids beyond the vocabulary.
    """
    import numpy as np

    ids, labels = [], []
    for batch in table.batches(columns=["id", "input_ids", "labels"]):
        for row in batch.to_pylist():
            found = np.array(row["input_ids"], np.int64)
            where = f"`{table.manifest.name}`, row {row['id']}"
            if len(found) < 2:
                raise InputError(f"{where}: expected at least 2 tokens; found {len(found)}.")
            if found.max() >= vocabulary or found.min() < 0:
                raise InputError(
                    f"{where}: expected token ids below {vocabulary}; found {found.max()}. The rows"
                    " were made with another model's tokenizer."
                )
            ids.append(found)
            labels.append(row["labels"])
    return ids, labels


def _whole(
    options: ActivationThresholdsOptions,
    dense: Evaluation,
    sparse: Evaluation,
    cett: float | None,
) -> dict[str, Any]:
    return {
        "id": row_id("activation_thresholds", -1, "", "model"),
        "layer": -1,
        "module": "",
        "kind": "model",
        "thresholds": [],
        "sparsity": None if options.method == "ppl_p" else options.sparsity,
        "live": sparse.share(),
        "dense_loss": dense.loss,
        "sparse_loss": sparse.loss,
        "cett": cett,
    }


def _places(
    thresholds: Thresholds,
    sparse: Evaluation,
    shares: Mapping[tuple[int, str, str], float | None],
) -> list[dict[str, Any]]:
    made = []
    for (layer, site), value in thresholds.items():
        alive, total = sparse.live[layer, site]
        made.append(
            {
                "id": row_id("activation_thresholds", layer, site.module, site.kind),
                "layer": layer,
                "module": site.module,
                "kind": site.kind,
                "thresholds": value.reshape(-1).tolist(),
                "sparsity": shares[layer, site.module, site.kind],
                "live": alive / total,
                "dense_loss": None,
                "sparse_loss": None,
                "cett": None,
            }
        )
    return made


SPEC = StepSpec(
    name="activation_thresholds",
    version=1,
    options=ActivationThresholdsOptions,
    inputs={
        "rows": Slot(("calibration_rows",)),
        "evaluation": Slot(("calibration_rows",), optional=True),
        "model": Slot(("train_lm", *MODEL_STEPS), optional=True),
    },
    plan=plan,
    finish=finish,
    cleanup=remove_work,
    about="Sizes under which activations may be left out, and what that costs.",
)
