"""Step `token_signals`: what causal models say about each trainable token of the chats.

The expensive part of choosing samples and tokens, done once; any method decides from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...errors import InputError, RecipeError
from ...storage import Table
from ..bundles import shard_of
from ..causal_files import causal_source, checkpoints_of
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import causal, resolved_causal
from ..reuse import RowWise
from ..sft_tables import SIGNAL_COLUMNS, TOKEN_SIGNALS
from ..tables import shard_ranges

Signal = Literal["loss", "rank", "reference", "history", "attention", "alone", "trajectory"]
_COLUMNS = ["id", "domain", "input_ids", "trainable", "turn", "protected"]


class TokenSignalsOptions(StepOptions):
    """Options of `token_signals`.

    A model is a folder, a hub id, `step:NAME` (the train_lm table given as input `model`), or
    `checkpoint:0` and so on, an earlier state of that table's model.

    Attributes
    ----------
    signals
        `loss` (always on): loss, entropy and log-sum-exp of each target. `rank`: of the target.
        `reference`, `history`: loss under those models. `attention`: on the prompt.
        `alone`: mean loss of the answers without their prompts. `trajectory`: mean loss under
        each checkpoint of the table and under `model` last, or under the models of `trajectory`.
    model, reference, history
        The model that scores (None: the input `model`), and those the signals of their name
        need. All must have the tokenizer that made the tokens.
    trajectory
        Models from the first to the last, in place of the table's checkpoints.
    layer, exclude_sink
        Of `attention`: decoder layer, from the end where negative; first tokens that do not
        count as prompt.
    rows_a_shard
        Samples in a shard at most, the work that is redone after a failure.
    tokens_a_batch
        Padded tokens in a batch at most; samples of like length go together. A longer sample
        goes alone. A GPU wants more of them, a CPU no more than its cache holds. This and
        `rows_a_shard` decide the shapes of matrix products, and so the last bits of the numbers
        (differences of about 1e-5 nats in float32): they enter the key.
    device, dtype
        Of the models. `dtype` changes numbers and enters the key, `device` does not.
    """

    model: str | None = None
    signals: list[Signal] = Field(default=["loss"], min_length=1)
    reference: str | None = None
    history: str | None = None
    trajectory: list[str] | None = None
    layer: int = -1
    exclude_sink: int = Field(default=0, ge=0)
    rows_a_shard: int = Field(default=256, ge=1, le=1_000_000)
    tokens_a_batch: int = Field(default=2048, ge=1)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def plan(options: TokenSignalsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each few samples; the digests of all models in the key.

    Raises
    ------
    RecipeError
        A signal needs a model that was not named, or a model is named that no signal needs.
    InputError
        A model has another tokenizer than the one that made the tokens.
    """
    tokens, table = inputs["tokens"], inputs.get("model")
    signals = sorted({"loss", *options.signals}, key=list(SIGNAL_COLUMNS).index)
    sources = {
        role: causal_source(name, table) for role, name in _models(options, signals, table).items()
    }
    digests: dict[str, str] = {}
    for role, source in sources.items():
        found = resolved_causal(source)
        _check_tokenizer(tokens, found.tokenizer_sha256, f"{role} ({source})")
        digests[role] = found.sha256
    digests |= {name: tokens.manifest.models[name] for name in ("tokenizer", "chat_template")}
    schema = pa.schema(
        [*TOKEN_SIGNALS, *(field for name in signals for field in SIGNAL_COLUMNS[name])]
    )
    ranges = [
        (part["shard"], start, stop)
        for part in tokens.manifest.parts
        for start, stop in shard_ranges(part["rows"], options.rows_a_shard)
    ]
    identity = {
        "signals": signals,
        "tokens_a_batch": options.tokens_a_batch,
        "rows_a_shard": options.rows_a_shard,
        "dtype": options.dtype,
    }
    if "attention" in signals:
        identity |= {"layer": options.layer, "exclude_sink": options.exclude_sink}
    notes = {"models": {"model": options.model or "input", **_named(options)}, "signals": signals}
    return Plan(schema, len(ranges), identity, digests, payload=(sources, ranges), notes=notes)


def _named(options: TokenSignalsOptions) -> dict[str, Any]:
    named = {"reference": options.reference, "history": options.history}
    return {role: name for role, name in named.items() if name is not None}


def _models(
    options: TokenSignalsOptions, signals: Sequence[str], table: Table | None
) -> dict[str, str | None]:
    """Role to name of each model that the signals need, the one that scores first."""
    named = _named(options)
    for role in ("reference", "history"):
        if (role in signals) != (role in named):
            raise RecipeError(
                f"token_signals: expected the option `{role}` (a model) and the signal `{role}`"
                " together; found one of them. Give both or neither."
            )
    trajectory: list[str | None] = []
    if "trajectory" in signals:
        if options.trajectory is not None:
            trajectory = [*options.trajectory]
        else:
            count = checkpoints_of(table) if table is not None else 0
            trajectory = [*(f"checkpoint:{number}" for number in range(count)), options.model]
        if len(trajectory) < 2:
            raise RecipeError(
                "token_signals: expected at least two models for the signal `trajectory`; found"
                f" {len(trajectory)}. Give `trajectory` a list of models, or a train_lm table"
                " with checkpoints as input `model`."
            )
    elif options.trajectory is not None:
        raise RecipeError("token_signals: `trajectory` is given, but not among `signals`.")
    numbered = {f"trajectory_{number}": name for number, name in enumerate(trajectory)}
    return {"model": options.model, **named, **numbered}


def _check_tokenizer(tokens: Table, found: str, model: str) -> None:
    wanted = tokens.manifest.models["tokenizer"]
    if wanted != found:
        raise InputError(
            f"table `{tokens.manifest.name}` ({tokens.key[:12]}) was made with the tokenizer"
            f" {wanted[:16]}, and {model} has {found[:16]}. Its ids mean other tokens to that"
            " model: tokenise with the model's own tokenizer, or name another model."
        )


def read(job: Job, index: int) -> Iterator[pa.Table]:
    """The samples of one shard."""
    number, start, stop = job.plan.payload[1][index]
    yield shard_of(job.input("tokens"), number, _COLUMNS).slice(start, stop - start)


def find(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Samples with these ids."""
    return job.input("tokens").lookup(ids, columns=_COLUMNS, missing="skip")


def score(job: Job, rows: pa.Table, out: Rows) -> None:
    """Score some samples; those without a target or a finite loss go aside."""
    from ...pruners.signals.tokens import PromptAttention
    from ..token_scoring import score_samples

    options: TokenSignalsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    made = score_samples(
        rows,
        job.plan.payload[0],
        lambda source: causal(source, options.device, options.dtype),
        job.plan.schema.names,
        tokens_a_batch=options.tokens_a_batch,
        attention=PromptAttention(layer=options.layer, exclude_sink=options.exclude_sink),
    )
    name = job.input("tokens").manifest.name
    for row, reason in made.rejected():
        out.reject(row, reason, f"sample {row['id']} of `{name}`")
    out.write(made.table(job.plan.schema))
    out.count(len(made.good), {})


ROWS = RowWise(("tokens",), read, find, score)
SPEC = StepSpec(
    name="token_signals",
    version=1,
    options=TokenSignalsOptions,
    inputs={
        "tokens": Slot(("tokenize_chats",)),
        "model": Slot(("train_lm",), optional=True),
    },
    plan=plan,
    shard=ROWS.make,
    row_wise=ROWS,
    about="What causal models say about each trainable token.",
)
