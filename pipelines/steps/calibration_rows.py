"""Step `calibration_rows`: rows to calibrate, recover or judge a model on, from any table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import InputError, RecipeError
from ...storage import Table, TableWriter, row_id
from ..causal_files import causal_source
from ..compression import calibration
from ..compression.calibration import IGNORED, Choice, Ints, Part, Sources
from ..compression.tables import CALIBRATION
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, write_whole
from ..tables import among, kept_ids

_READ_AT_ONCE = 256
_DECISIONS = ("prune_sft", "prune_dataset", "prune_scores", "prune_passages")


class CalibrationRowsOptions(StepOptions):
    """Options of `calibration_rows`.

    Attributes
    ----------
    rows, length
        So many rows, of so many tokens: exactly where they are packed, at most elsewhere.
    pack
        Lay source rows end to end and cut windows of `length`; without it a row is a source row.
    shortest
        Unpacked rows of fewer tokens are passed over.
    choose
        random, stratified (domains in proportion), balanced (domains alike), highest or lowest
        (by score), first (by id).
    score
        Column of the input `scores` to choose by; kept beside the row.
    domains
        Only rows of these; all where not given.
    part, evaluation_share, split_seed
        calibration or evaluation: rows are split by their ids, so that no row is in both; all
        takes no notice of the split.
    tokenizer
        Folder or hub id, for texts; that of the input `model` where not given.
    column
        Of the texts.
    """

    rows: int = Field(default=128, ge=1, le=10_000_000)
    length: int = Field(default=256, ge=2, le=1_000_000)
    pack: bool = True
    shortest: int = Field(default=2, ge=2)
    choose: Choice = "random"
    score: str | None = None
    domains: list[str] | None = None
    part: Part = "all"
    evaluation_share: float = Field(default=0.1, gt=0, lt=1)
    split_seed: int = 0
    tokenizer: str | None = None
    column: str = "text"


def plan(
    options: CalibrationRowsOptions, inputs: Mapping[str, Table], context: StepContext
) -> Plan:
    """No shards: the rows are few, and each depends on the order of all."""
    if ("tokens" in inputs) == ("texts" in inputs):
        raise RecipeError(
            "calibration_rows: expected one of the inputs `tokens` (tokenize_chats, export_sft) and"
            " `texts` (chunk, read_dataset); found both or none."
        )
    if (options.score is None) != ("scores" not in inputs):
        raise RecipeError(
            "calibration_rows: expected the option `score` and the input `scores` together; found"
            " one of them."
        )
    models: dict[str, str] = {}
    payload = None
    if "texts" in inputs:
        from ...pruners.models.tokenizers import load_tokenizer, tokenizer_folder, tokenizer_sha256

        payload = str(tokenizer_folder(causal_source(options.tokenizer, inputs.get("model"))))
        models["tokenizer"] = tokenizer_sha256(load_tokenizer(payload))
        _check_column(inputs["texts"], options.column)
    else:
        found = inputs["tokens"].manifest.models
        models |= {name: found[name] for name in ("tokenizer", "chat_template") if name in found}
    if options.score is not None:
        _check_column(inputs["scores"], options.score)
    identity = options.model_dump(exclude={"tokenizer"})
    notes = {"source": _source(inputs).manifest.name, "seed": context.seed, **identity}
    return Plan(CALIBRATION, None, identity, models, payload=payload, notes=notes)


def _source(inputs: Mapping[str, Table]) -> Table:
    return inputs["tokens"] if "tokens" in inputs else inputs["texts"]


def _check_column(table: Table, column: str) -> None:
    if column not in table.schema.names:
        raise RecipeError(
            f"`{table.manifest.name}` has no column `{column}`; it has"
            f" {', '.join(table.schema.names)}."
        )


def finish(job: Job, writer: TableWriter) -> None:
    """Choose, tokenise and write."""
    options: CalibrationRowsOptions = job.options  # type: ignore[assignment]
    sources = _sources(job, options)
    order = calibration.order_of(sources, options.choose, job.seed)
    rows = calibration.in_order(sources, order, _reader(job, options), _READ_AT_ONCE)
    if options.pack:
        made = [
            _row(number, window.sources, window.domain, window.input_ids, window.labels, None)
            for number, window in enumerate(
                calibration.packed_rows(rows, options.rows, options.length)
            )
        ]
    else:
        made = [
            _row(number, [row.id], row.domain, row.input_ids, row.labels, row.score)
            for number, row in enumerate(
                calibration.single_rows(rows, options.rows, options.length, options.shortest)
            )
        ]
    if len(made) < options.rows:
        source = job.input("tokens" if job.has("tokens") else "texts").manifest.name
        raise InputError(
            f"calibration_rows: expected {options.rows} rows of {options.length} tokens"
            f"{'' if options.pack else f' (at least {options.shortest})'}; found {len(made)} in the"
            f" {len(sources.ids)} rows of `{source}` that may be used. Lower `rows` or `length`,"
            " set `pack: true`, or read more rows."
        )
    write_whole(writer, pa.Table.from_pylist(made, CALIBRATION))


def _row(
    number: int, sources: list[int], domain: str, ids: Ints, labels: Ints, score: float | None
) -> dict[str, Any]:
    return {
        "id": row_id("calibration_rows", number, *sources),
        "domain": domain,
        "input_ids": ids,
        "labels": labels,
        "sources": sources,
        "score": score,
    }


def _sources(job: Job, options: CalibrationRowsOptions) -> Sources:
    """The rows that may be chosen: of the domains wanted, kept by the decision, of the part."""
    table = job.input("tokens" if job.has("tokens") else "texts")
    domain = next((name for name in ("domain", "group") if name in table.schema.names), None)
    ids, domains = [], []
    for batch in table.batches(columns=["id", *([domain] if domain else [])]):
        ids.append(batch.column("id").to_numpy(zero_copy_only=False).astype(np.int64))
        named = batch.column(domain).to_pylist() if domain else [""] * batch.num_rows
        domains.append(np.array(named, object))
    found = Sources(
        np.concatenate(ids) if ids else np.zeros(0, np.int64),
        np.concatenate(domains) if domains else np.zeros(0, object),
        None,
    )
    if options.domains is not None:
        found = found.take(np.isin(found.domains.astype(str), options.domains))
    if job.has("decision"):
        found = found.take(among(found.ids, kept_ids(job.input("decision"))))
    if options.score is not None:
        found = _scored(job.input("scores"), options.score, found)
    return calibration.part_of(found, options.part, options.evaluation_share, options.split_seed)


def _scored(table: Table, column: str, sources: Sources) -> Sources:
    """The rows that have a finite score, with it; a list's mean is taken."""
    values: dict[int, float] = {}
    for batch in table.batches(columns=["id", column]):
        for row in batch.to_pylist():
            value = row[column]
            if isinstance(value, list):
                value = float(np.mean(value)) if value else None
            if value is not None and np.isfinite(value):
                values[row["id"]] = float(value)
    at = np.array([int(id_) in values for id_ in sources.ids], np.bool_)
    some = sources.take(at)
    score = np.array([values[int(id_)] for id_ in some.ids], np.float32)
    return Sources(some.ids, some.domains, score)


def _reader(job: Job, options: CalibrationRowsOptions) -> Any:
    if job.has("texts"):
        return _read_texts(job, options)
    return _read_tokens(job)


def _read_tokens(job: Job) -> Any:
    """Tokens with the labels of an export, or of what may be trained and a decision kept."""
    table = job.input("tokens")
    exported = "labels" in table.schema.names
    columns = ["id", "input_ids", "labels" if exported else "trainable"]
    kept = "token_keep" in job.input("decision").schema.names if job.has("decision") else False

    def read(ids: Ints) -> Iterator[tuple[Ints, Ints]]:
        rows = {row["id"]: row for row in table.lookup(ids, columns=columns).to_pylist()}
        keeps: dict[int, list[bool]] = {}
        if kept:
            found = job.input("decision").lookup(ids, columns=["id", "token_keep"])
            keeps = {row["id"]: row["token_keep"] for row in found.to_pylist()}
        for id_ in ids:
            row = rows[int(id_)]
            tokens = np.array(row["input_ids"], np.int64)
            if exported:
                yield tokens, np.array(row["labels"], np.int64)
                continue
            places = np.flatnonzero(row["trainable"])
            if kept:
                places = places[np.array(keeps[int(id_)], np.bool_)]
            labels = np.full(len(tokens), IGNORED, np.int64)
            labels[places] = tokens[places]
            yield tokens, labels

    return read


def _read_texts(job: Job, options: CalibrationRowsOptions) -> Any:
    """Texts as a model reads them, each followed by the end of sequence; all tokens trained."""
    from ...pruners.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(job.plan.payload)
    end = tokenizer.eos_token_id
    table = job.input("texts")

    def read(ids: Ints) -> Iterator[tuple[Ints, Ints]]:
        found = table.lookup(ids, columns=["id", options.column]).to_pylist()
        rows = {row["id"]: row[options.column] or "" for row in found}
        texts = [rows[int(id_)] for id_ in ids]
        for made in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            tokens = np.array([*made, end] if end is not None else made, np.int64)
            yield tokens, tokens

    return read


SPEC = StepSpec(
    name="calibration_rows",
    version=1,
    options=CalibrationRowsOptions,
    inputs={
        "tokens": Slot(("tokenize_chats", "export_sft"), optional=True),
        "texts": Slot(("chunk", "read_dataset"), optional=True),
        "decision": Slot(_DECISIONS, optional=True),
        "scores": Slot(
            ("token_signals", "import_scores", "prune_scores", "prune_sft", "prune_dataset"),
            optional=True,
        ),
        "model": Slot(("train_lm",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="Rows to calibrate, recover or judge a model on, from any table.",
)
