"""Step `prune_sft`: which samples of a fine-tuning set stay, and which of their tokens.

No model runs here: it decides over what `token_signals` stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pydantic import Field, model_validator

from ...errors import InputError, RecipeError, StoreError
from ...pruners.contract import SIGNALS, Pruner
from ...storage import Table
from ..bundles import shard_of
from ..decisions import BEFORE, MethodOptions
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..sft_decide import Earlier, decide
from ..sft_signals import (
    SftRows,
    known_signals,
    rows_of_signals,
    rows_of_tokens,
    with_embeddings,
    with_given,
)
from ..sft_tables import DECISION


class PruneSftOptions(MethodOptions):
    """Options of `prune_sft`: a method over samples or tokens, and that method's own options.

    Attributes
    ----------
    by_domain
        Decide within each domain on its own (the domain field of `read_chats`), so that small
        domains survive.
    given
        Signals that stand in the rows as they were read: signal name to (dotted) key, such as
        `{rating: scores.educational}`. Needs the input `chats`.
    """

    method: str = "qtuning"
    by_domain: bool = False
    given: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def units(cls) -> frozenset[str]:
        """Methods that decide about samples or tokens."""
        return frozenset({"sample", "token"})

    @model_validator(mode="after")
    def _given_are_signals(self) -> PruneSftOptions:
        numbers = [name for name, spec in SIGNALS.items() if spec.dtype == "float32"]
        numbers = [name for name in numbers if SIGNALS[name].shape == "N"]
        for name in self.given:
            if name not in numbers:
                raise ValueError(f"unknown signal `{name}` in `given`; known: {', '.join(numbers)}")
        return self


def plan(options: PruneSftOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each shard of signals; one for all where the method looks at all rows."""
    pruner = options.pruner()
    base = _base(inputs)
    reasons = _try(pruner, options, inputs, context.seed)
    whole = pruner.scope == "table" or options.by_domain
    shards = [-1] if whole else base.shards()
    identity = {
        "method": options.method,
        "options": options.options,
        "made": repr(pruner),
        "by_domain": options.by_domain,
        "given": options.given,
    }
    notes = {"token_reasons": [*reasons, BEFORE]} if pruner.unit == "token" else {}
    return Plan(DECISION, len(shards), identity, payload=shards, notes=notes)


def _base(inputs: Mapping[str, Table]) -> Table:
    return inputs["signals"] if "signals" in inputs else inputs["tokens"]


def _try(
    pruner: Pruner, options: PruneSftOptions, inputs: Mapping[str, Table], seed: int
) -> tuple[str, ...]:
    """The method's reasons, from a look at no rows: what it lacks, it says now."""
    if options.given and "chats" not in inputs:
        raise RecipeError(
            "`given` reads scores from the rows, so it needs the input `chats`. Add"
            " `chats: NAME_OF_READ_CHATS` to the step's inputs."
        )
    columns = list(_base(inputs).schema.names) + (["embedding"] if "embeddings" in inputs else [])
    missing = sorted(pruner.needs - known_signals(columns, options.given))
    if missing:
        raise RecipeError(
            f"method `{options.method}` needs the signals {', '.join(missing)}, which"
            f" `{_base(inputs).manifest.name}` does not hold. Name what it needs in the option"
            " `signals` of a token_signals step and give that step as input `signals`; vectors"
            " come from an embed step (input `embeddings`), given scores from `given`."
        )
    rows = _read(
        _base(inputs).schema.empty_table(),
        "signals" in inputs,
        {
            role: table.schema.empty_table()
            for role, table in inputs.items()
            if role in ("embeddings", "chats")
        },
        options,
    )
    none = rows.offset[:0]
    if pruner.unit == "token":
        return pruner(rows.of_tokens(pruner, none), seed=seed).reasons
    return pruner(rows.of_samples(pruner, none), seed=seed).reasons


def _read(
    table: pa.Table, signals: bool, beside: Mapping[str, pa.Table], options: PruneSftOptions
) -> SftRows:
    rows = rows_of_signals(table) if signals else rows_of_tokens(table)
    if "embeddings" in beside:
        rows = with_embeddings(rows, beside["embeddings"])
    if options.given:
        rows = with_given(rows, beside["chats"], options.given)
    return rows


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide about the samples of one shard, or of all."""
    options: PruneSftOptions = job.options  # type: ignore[assignment]
    base = job.input("signals" if job.has("signals") else "tokens")
    number = job.plan.payload[index]
    table = base.to_table() if number < 0 else shard_of(base, number)
    ids = table.column("id").to_pylist()
    beside = {}
    for role, columns in (("embeddings", ["id", "embedding"]), ("chats", ["source", "raw"])):
        if job.has(role) and (role == "embeddings" or options.given):
            beside[role] = _lookup(job.input(role), ids, columns)
    rows = _read(table, job.has("signals"), beside, options)
    earlier = Earlier.nothing(rows)
    if job.has("after"):
        wanted = ["token_keep", "reason", "weight"]
        earlier = Earlier.of(_lookup(job.input("after"), ids, wanted))
        if len(earlier.tokens) != int(rows.offset[-1]):
            raise StoreError(
                f"`{job.input('after').manifest.name}` decided over other tokens than"
                f" `{base.manifest.name}` holds. Make both from the same tokenize_chats table."
            )
    made, dropped = decide(
        options.pruner(), rows, earlier, seed=job.seed, by_domain=options.by_domain
    )
    out.write(made)
    out.count(made.num_rows - sum(dropped.values()), dropped)


def _lookup(table: Table, ids: list[int], columns: list[str]) -> pa.Table:
    try:
        return table.lookup(ids, columns=columns)
    except InputError as error:
        raise InputError(
            f"`{table.manifest.name}` does not hold all samples that are to be decided: {error}"
        ) from error


SPEC = StepSpec(
    name="prune_sft",
    version=1,
    options=PruneSftOptions,
    inputs={
        "tokens": Slot(("tokenize_chats",)),
        "signals": Slot(("token_signals",), optional=True),
        "chats": Slot(("read_chats",), optional=True),
        "embeddings": Slot(("embed",), optional=True),
        "after": Slot(("prune_sft",), optional=True),
    },
    plan=plan,
    shard=shard,
    about="Which samples of a fine-tuning set stay, and which of their tokens.",
)
