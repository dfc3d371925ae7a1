"""How a step runs: once for each key, in shards, wherever they are made.

A step is a plan and a shard function. The plan says what enters the key (options, digests of
what is read, models), the schema, and how many shards there are. The shard function makes the
rows of one shard and nothing else. Whatever stops a run, the next one redoes at most the
shards that were under way; the rows are the same with any number of workers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError
from ..storage import Manifest, Store, Table, TableWriter
from .progress import Progress, Silent

if TYPE_CHECKING:
    from ..storage import ShardWriter
    from .reuse import Earlier, RowWise


class StepOptions(BaseModel):
    """Options of a step: strict types, unknown keys refused, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    # Names of the options that hold paths; relative ones are made absolute on reading.
    paths: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def known_keys(cls, given: Mapping[str, Any]) -> list[str]:
        """The keys that a recipe may give, which may depend on the values of other keys."""
        return list(cls.model_fields)

    @classmethod
    def override(cls, given: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
        """The values of a recipe's step with one of them set anew."""
        return {**given, key: value}

    @classmethod
    def rebase(cls, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The values with relative paths made absolute against `folder`."""
        made = dict(given)
        for key in cls.paths:
            if isinstance(made.get(key), str):
                made[key] = _absolute(made[key], folder)
            elif isinstance(made.get(key), list):
                made[key] = [
                    _absolute(item, folder) if isinstance(item, str) else item for item in made[key]
                ]
        return made


class ChoosingOptions(StepOptions):
    """Options of a step that names a method, with that method's own options beside the step's.

    In a recipe both stand side by side; here those of the method are gathered in `options`.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def options_of(cls, method: str) -> list[str] | None:
        """Names of a method's own options; None where no such method may be named."""
        raise NotImplementedError

    @classmethod
    def known_keys(cls, given: Mapping[str, Any]) -> list[str]:
        """`method`, the step's own options, and the options of the method named."""
        own = [name for name in cls.model_fields if name != "options"]
        more = cls.options_of(given.get("method", cls.model_fields["method"].default))
        if more is None:
            # Validation says what is wrong with the method; its options cannot be judged.
            return [*own, *(key for key in given if key not in own)]
        return own + more

    @classmethod
    def override(cls, given: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
        """As for any step; another method leaves the options of the one before it behind."""
        if key != "method" or given.get("method") == value:
            return super().override(given, key, value)
        own = {name for name in cls.model_fields if name != "options"} | {"step", "inputs"}
        return {name: item for name, item in given.items() if name in own} | {key: value}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "options" in data:
            return data
        own = {key: value for key, value in data.items() if key in cls.model_fields}
        rest = {key: value for key, value in data.items() if key not in cls.model_fields}
        return {**own, "options": rest}


def _absolute(path: str, folder: Path) -> str:
    if path.startswith("builtin:"):
        return path
    return str(folder / Path(path).expanduser())


@dataclass(frozen=True, slots=True)
class Slot:
    """An input of a step: which steps may fill it, and whether it may stay empty."""

    steps: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run of a step will make.

    Attributes
    ----------
    schema
        Of the rows, first column `id` int64.
    shards
        How many; 0 makes an empty table, None leaves all writing to `finish`.
    identity
        What enters the key beside inputs, models and seed: options that change rows, and
        digests of files read. JSON-able. Never a path or a number of workers.
    models
        Name to digest of each model that makes the rows.
    payload
        What the shard function needs besides options and inputs; picklable and small.
    notes
        For people; does not enter the key.
    """

    schema: pa.Schema
    shards: int | None
    identity: Mapping[str, Any]
    models: Mapping[str, str] = field(default_factory=dict)
    payload: Any = None
    kind: Literal["table", "index", "report"] = "table"
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """Where and how a step runs; none of it changes a row.

    `pool` makes the shards where it is given, else `workers` processes of this step's own share
    them; `threads` is what each gives to its models (None leaves the libraries' own default).
    Float sums can depend on `threads`, so bit-equal rows across machines need the same value.
    With `reuse` a step that works row by row takes the rows of an earlier table: see `reuse`.
    """

    store: Store
    name: str = ""
    seed: int = 0
    bad_rows: float = 0.0
    workers: int = 1
    threads: int | None = None
    progress: Progress = field(default_factory=Silent)
    pool: WorkerPool | None = None
    reuse: bool = True


@dataclass(frozen=True)
class Job:
    """One run of a step, in a form that another process can take up."""

    store: Store
    step: str
    table: str
    key: str
    options: StepOptions
    inputs: Mapping[str, str]
    plan: Plan
    seed: int
    tolerant: bool
    threads: int | None
    earlier: Earlier | None = None

    def input(self, role: str) -> Table:
        """The table that fills an input."""
        return _open_table(self.store, self.store.uri, self.inputs[role])

    def has(self, role: str) -> bool:
        """Whether an optional input was given."""
        return role in self.inputs

    def output(self) -> Table:
        """The table that the job has made."""
        return _open_table(self.store, self.store.uri, self.key)


class Rows:
    """Where a shard function puts its rows.

    A row that cannot be used goes to `reject`: where the recipe allows bad rows it is written
    to the rejects table with its reason, else the run stops with that reason.
    """

    def __init__(self, writer: ShardWriter, tolerant: bool) -> None:
        self._writer = writer
        self._tolerant = tolerant
        self.rejected = 0

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows of the plan's schema."""
        self._writer.write(rows)

    def count(self, kept: int, dropped: Mapping[str, int]) -> None:
        """Tell the manifest what this shard kept and dropped, by reason."""
        self._writer.count(kept=kept, dropped=dropped)

    def reject(self, row: Mapping[str, Any], reason: str, where: str) -> None:
        """Put a bad row aside, or stop: `where` names file, row and column."""
        if not self._tolerant:
            raise InputError(
                f"{where}: {reason} Mend the row, or allow a share of bad rows with"
                " `bad_rows` in the recipe (--set bad_rows=0.01)."
            )
        self.rejected += 1
        self._writer.reject(row, f"{where}: {reason}")


def write_whole(writer: TableWriter, rows: pa.Table) -> None:
    """Write all rows of a table that has no shards of its own, each of them kept."""
    for number in writer.pending(1):
        with writer.shard(number) as out:
            out.write(rows)
            out.count(kept=rows.num_rows, dropped={})


def no_shards(job: Job, index: int, out: Rows) -> None:
    """The shard function of a step whose rows and files `finish` writes all at once."""
    raise NotImplementedError(f"step `{job.step}` has no shards of its own")


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step: its name, version, options and inputs, and the functions that do the work.

    Calling it, `spec(options, inputs, context) -> Manifest`, runs the step or finds that its
    table exists. `version` goes up whenever the same options and inputs would give other rows.
    `finish`, where there is one, attaches files to the table before it is committed; `cleanup` is
    called with the table's key once it is, to remove what a killed run would have gone on from.
    `row_wise`, where there is one, says that rows do not depend on each other: its `make` is the
    shard function then.
    """

    name: str
    version: int
    options: type[StepOptions]
    inputs: Mapping[str, Slot]
    plan: Callable[[Any, Mapping[str, Table], StepContext], Plan]
    shard: Callable[[Job, int, Rows], None] = no_shards
    finish: Callable[[Job, TableWriter], None] | None = None
    cleanup: Callable[[str], None] | None = None
    row_wise: RowWise | None = None
    about: str = ""

    def __call__(
        self, options: StepOptions, inputs: Mapping[str, str], context: StepContext
    ) -> Manifest:
        """Run the step on tables of the store, given by key or name.

        Raises
        ------
        InputError
            A row is bad and no bad rows are allowed, or more rows are bad than allowed.
        StoreError, ModelError
            A table or a model cannot be read.
        """
        return _run(self, options, inputs, context)


def table_key(
    spec: StepSpec, options: StepOptions, inputs: Mapping[str, str], context: StepContext
) -> str:
    """The key of the table that a step makes, from tables that exist; the step does not run."""
    keys, plan = _planned(spec, options, inputs, context)
    return context.store.key(**_identity(spec, plan, keys, context.seed))


def _planned(
    spec: StepSpec, options: StepOptions, inputs: Mapping[str, str], context: StepContext
) -> tuple[dict[str, str], Plan]:
    keys = {role: context.store.resolve(inputs[role]) for role in spec.inputs if role in inputs}
    tables = {role: context.store.table(key) for role, key in keys.items()}
    return keys, spec.plan(options, tables, context)


def _identity(spec: StepSpec, plan: Plan, keys: Mapping[str, str], seed: int) -> dict[str, Any]:
    """What a table's key is the digest of."""
    return {
        "step": spec.name,
        "version": spec.version,
        "options": {**plan.identity, "inputs": list(keys)},
        "inputs": list(keys.values()),
        "models": dict(plan.models),
        "seed": seed,
    }


def _run(
    spec: StepSpec, options: StepOptions, inputs: Mapping[str, str], context: StepContext
) -> Manifest:
    keys, plan = _planned(spec, options, inputs, context)
    name = context.name or spec.name
    writing = context.store.write(
        name=name,
        schema=plan.schema,
        kind=plan.kind,
        **_identity(spec, plan, keys, context.seed),
    )
    with writing as writer:
        if writer.committed:
            context.progress.start(name, 0)
            manifest = context.store.manifest(writer.key)
            _check_share(
                manifest.rejected,
                manifest.rows,
                context.bad_rows,
                name,
                lambda most: context.store.table(writer.key).reject_reasons(most),
            )
            context.store.point(name, writer.key)
            if spec.cleanup is not None:
                spec.cleanup(writer.key)
            context.progress.finish()
            return manifest
        job = Job(
            store=context.store,
            step=spec.name,
            table=name,
            key=writer.key,
            options=options,
            inputs=keys,
            plan=plan,
            seed=context.seed,
            tolerant=context.bad_rows > 0,
            threads=context.threads,
        )
        if context.reuse and spec.row_wise is not None:
            job = replace(job, earlier=spec.row_wise.earlier(job, writer, context.store))
        shards = plan.shards or 0
        pending = [] if plan.shards is None else writer.pending(shards)
        context.progress.start(name, max(shards, 1))
        context.progress.advance(shards - len(pending))
        _shards(spec, job, pending, writer, context)
        _check_share(*writer.tally(), context.bad_rows, name, writer.reject_reasons)
        if spec.finish is not None:
            spec.finish(job, writer)
        reused = {} if spec.row_wise is None else spec.row_wise.reused(job, shards)
        manifest = writer.commit(notes={**plan.notes, **reused})
        if spec.cleanup is not None:
            spec.cleanup(writer.key)
        context.progress.finish()
        return manifest


def run_shard(job: Job, shard: int) -> int:
    """Make one shard of a job; any process that sees the store may do it."""
    from .steps import STEPS

    spec = STEPS[job.step]
    with _reopen(spec, job) as writer:
        _one_shard(spec, job, shard, writer)
    return shard


def _reopen(spec: StepSpec, job: Job) -> TableWriter:
    return job.store.write(
        name=job.table,
        schema=job.plan.schema,
        kind=job.plan.kind,
        **_identity(spec, job.plan, job.inputs, job.seed),
    )


def _one_shard(spec: StepSpec, job: Job, shard: int, writer: TableWriter) -> None:
    with writer.shard(shard) as out:
        spec.shard(job, shard, Rows(out, job.tolerant))


class WorkerPool(Protocol):
    """Workers that make the shards of one step after another: see `workers`.

    Attributes
    ----------
    least
        Pending shards from which on the pool is worth the while; None where it never is.
    """

    least: int | None

    def run(self, job: Job, pending: list[int], progress: Progress) -> None:
        """Make those shards; the first failure stops the rest, and what was done is kept."""
        ...


def _shards(
    spec: StepSpec, job: Job, pending: list[int], writer: TableWriter, context: StepContext
) -> None:
    if context.pool is not None:
        if context.pool.least is not None and len(pending) >= context.pool.least:
            context.pool.run(job, pending, context.progress)
            return
    elif context.workers > 1 and len(pending) > 1:
        from .workers import Workers

        count = min(context.workers, len(pending))
        with Workers(count=count, threads=context.threads).open() as pool:
            pool.run(job, pending, context.progress)
        return
    for shard in pending:
        _one_shard(spec, job, shard, writer)
        context.progress.advance()


def use_threads(threads: int | None) -> None:
    """Give torch that many threads in this process; None leaves its default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _check_share(
    rejected: int, rows: int, allowed: float, name: str, reasons: Callable[[int], list[str]]
) -> None:
    total = rejected + rows
    if rejected and rejected > allowed * total:
        first = "".join(f"\n  {reason}" for reason in reasons(3))
        raise InputError(
            f"step `{name}` rejected {rejected} of {total} rows, more than the share of"
            f" {allowed:g} that the recipe allows. Mend the input, or raise `bad_rows`. The first"
            f" of them:{first}"
        )


_TABLES: OrderedDict[tuple[str, str], Table] = OrderedDict()


def _open_table(store: Store, uri: str, key: str) -> Table:
    """A table, opened once a process: it keeps its index of ids. Tables never change."""
    found = _TABLES.pop((uri, key), None) or store.table(key)
    _TABLES[uri, key] = found
    while len(_TABLES) > 32:
        _TABLES.popitem(last=False)
    return found
