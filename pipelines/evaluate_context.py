"""How good context pruning is on labelled rows: `prunery evaluate context`.

Two steps over tables of the store. `context_scores` runs a method's model once over the rows and
keeps its score of every sentence; `evaluate_context` makes the figures from those scores alone,
so that other thresholds, budgets or resamples cost no model run, and a new model none of the
baselines'. The report is attached to the second table as `report.json` and `report.md`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from ..errors import InputError, RecipeError, StoreError
from ..storage import Store, Table, TableWriter, row_id
from .context_metrics import Ints, Labelled
from .context_quality import Quality, Scores, Settings, measure
from .context_scores import (
    METHOD_NAMES,
    PROBABILITIES,
    SCORES,
    MethodName,
    RowOptions,
    ScoreOptions,
)
from .engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from .evaluation_rows import ContextRow, cached_rows, flatten
from .progress import Progress, Silent
from .quality_markdown import to_markdown

MAIN = "provence"


class FigureOptions(StepOptions):
    """What to measure at, given the scores.

    Attributes
    ----------
    threshold
        The model's threshold in the headline rows; None takes the model's own.
    thresholds
        Further thresholds to decide at, each strict (`score > threshold`).
    targets
        Shares of characters removed at which methods are compared under one threshold for all.
    best_k
        Numbers of sentences kept of each passage under the best-k rule.
    resamples
        Bootstrap resamples by question, for 95 % percentile intervals.
    min_sentences, labelled_only, candidates
        Which of the scored rows are measured: passages of at least so many sentences; those
        with a label alone; the first so many rows of each question (None: all).
    """

    threshold: float | None = Field(None, ge=0, lt=1)
    thresholds: list[float] = Field(
        default=[0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    targets: list[float] = Field(default=[0.5, 0.59, 0.7])
    best_k: list[int] = Field(default=[1, 2, 3])
    resamples: int = Field(2000, ge=1)
    min_sentences: int = Field(1, ge=1)
    labelled_only: bool = False
    candidates: int | None = Field(None, ge=1)

    @field_validator("thresholds", "targets")
    @classmethod
    def _shares(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value < 1 for value in values):
            raise ValueError(f"expected values in [0, 1); found {values}")
        return values

    @field_validator("best_k")
    @classmethod
    def _counts(cls, values: list[int]) -> list[int]:
        if any(value < 1 for value in values):
            raise ValueError(f"expected counts of at least 1; found {values}")
        return values


class EvaluateContextOptions(RowOptions, FigureOptions):
    """Everything that `evaluate_context` needs: the rows, the methods, what to measure at."""

    paths: ClassVar[tuple[str, ...]] = ("rows",)
    methods: list[MethodName] = Field(default=list(METHOD_NAMES), min_length=1)
    name: str = Field("rows", min_length=1)
    seed: int = 0


FIGURES = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("at", pa.float64()),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class EvaluationReport:
    """What one evaluation found.

    Attributes
    ----------
    name
        Of the set of rows.
    summary
        Counts, model, threshold, seed, library versions, keys of the tables; plain values.
    quality
        Every figure, with curves and calibration.
    """

    name: str
    summary: Mapping[str, Any]
    quality: Quality

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json` and for storing."""
        return {"name": self.name, **self.summary, **self.quality.to_json()}

    def to_markdown(self, *, brief: bool = False) -> str:
        """Tables for a person; `brief` leaves most settings to the JSON."""
        return to_markdown(self.name, self.summary, self.quality, brief=brief)


def evaluate_context(
    options: EvaluateContextOptions,
    store: Store | None = None,
    *,
    workers: int = 1,
    threads: int | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Score labelled rows with every method and measure what each keeps.

    Parameters
    ----------
    options
        Rows, methods and settings.
    store
        Where scores and figures are kept; scores found there are not computed again. None
        uses a temporary folder, gone at the end.
    workers, threads, progress
        As for any step.

    Raises
    ------
    InputError
        A row is not what `evaluation_rows` describes.
    ModelError
        A model cannot be loaded.
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="prunery-evaluate-") as folder:
            return evaluate_context(
                options, Store(folder), workers=workers, threads=threads, progress=progress
            )
    scored: dict[str, str] = {}
    for method in dict.fromkeys(options.methods):
        context = StepContext(
            store=store,
            name=f"{_label(options.name)}-{method}",
            seed=options.seed,
            workers=workers,
            threads=threads,
            progress=progress or Silent(),
        )
        asked = ScoreOptions(**_values(options, RowOptions), method=method)
        scored[method] = SCORES(asked, {}, context).key
    measured = EVALUATE(
        _MeasureOptions(**_values(options, _MeasureOptions)),
        scored,
        StepContext(store=store, name=f"{_label(options.name)}-quality", seed=options.seed),
    )
    return read_report(store, measured.key)


def read_report(store: Store, ref: str) -> EvaluationReport:
    """The report attached to an `evaluate_context` table, named or by key."""
    told = json.loads(store.table(ref).attachment("report.json").read_text(encoding="utf-8"))
    quality = Quality.from_json(told)
    keys = {"figures", "curves", "calibration", "name"}
    return EvaluationReport(
        told["name"], {name: value for name, value in told.items() if name not in keys}, quality
    )


def _label(name: str) -> str:
    """A set's name as part of a table's: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "rows"


def _values(options: StepOptions, kind: type[StepOptions]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in kind.model_fields}


class _MeasureOptions(FigureOptions):
    rows: list[str]
    name: str


def _plan(options: _MeasureOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    # The rows enter the key through the scores, whose own key holds their digest.
    identity = {name: getattr(options, name) for name in FigureOptions.model_fields}
    return Plan(FIGURES, 1, {**identity, "name": options.name}, kind="report")


def _shard(job: Job, shard: int, out: Rows) -> None:
    rows = [
        {"id": row_id(f.method, f.rule, repr(f.at), f.metric), **asdict(f)}
        for f in _quality(job).figures
    ]
    out.write(pa.Table.from_pylist(rows, schema=FIGURES))


def _finish(job: Job, writer: TableWriter) -> None:
    options = _options(job)
    rows = cached_rows(options.rows)
    data = flatten([rows[i] for i in chosen_rows(rows, options)]).data
    tables = _tables(job)
    summary = {
        "questions": data.questions,
        "passages": len(data.question),
        "sentences": len(data.passage),
        "characters": int(data.chars.sum()),
        "labelled_questions": len(np.unique(data.owner[data.label == 1])),
        "answerable_questions": len(np.unique(data.span_question)),
        "threshold": _threshold(options, tables),
        "resamples": options.resamples,
        "seed": job.seed,
        "methods": {
            name: {
                "key": table.key,
                "models": dict(table.manifest.models),
                **{k: v for k, v in table.manifest.notes.items() if k != "rows"},
            }
            for name, table in tables.items()
        },
        "libraries": dict(next(iter(tables.values())).manifest.libraries),
        "key": job.key,
    }
    report = EvaluationReport(options.name, summary, _quality(job))
    text = json.dumps(report.to_json(), allow_nan=False, indent=1, sort_keys=True)
    writer.attach("report.json", text.encode())
    writer.attach("report.md", report.to_markdown().encode())


def _options(job: Job) -> _MeasureOptions:
    if not isinstance(job.options, _MeasureOptions):
        raise RecipeError(
            f"`evaluate_context` cannot use {type(job.options).__name__}; call the function"
            " `evaluate_context`, which makes both tables."
        )
    return job.options


def _tables(job: Job) -> dict[str, Table]:
    return {name: job.input(name) for name in METHOD_NAMES if job.has(name)}


def _threshold(options: FigureOptions, tables: Mapping[str, Table]) -> float:
    """The threshold asked for, else the model's own; 0.5 where no model was evaluated."""
    if options.threshold is not None:
        return options.threshold
    return float(tables[MAIN].manifest.notes["threshold"]) if MAIN in tables else 0.5


_made: dict[str, Quality] = {}  # of the one key that this process measured last


def _quality(job: Job) -> Quality:
    if job.key not in _made:
        options, tables = _options(job), _tables(job)
        rows = cached_rows(options.rows)
        chosen = chosen_rows(rows, options)
        data = flatten([rows[i] for i in chosen]).data
        settings = Settings(
            main=MAIN,
            threshold=_threshold(options, tables),
            thresholds=tuple(options.thresholds),
            targets=tuple(options.targets),
            best_k=tuple(options.best_k),
            resamples=options.resamples,
            seed=job.seed,
            probabilities=PROBABILITIES,
        )
        read = {name: table.to_table() for name, table in tables.items()}
        scores = scores_of(read, data, chosen)
        _made.clear()
        _made[job.key] = measure(data, scores, settings)
    return _made[job.key]


def chosen_rows(rows: Sequence[ContextRow], options: FigureOptions) -> Ints:
    """Numbers of the rows to measure, rising; InputError where none is left."""
    seen: Counter[str] = Counter()
    found = []
    for number, row in enumerate(rows):
        seen[row.group] += 1
        first = options.candidates is None or seen[row.group] <= options.candidates
        long = len(row.sentences) >= options.min_sentences
        if first and long and (row.labels is not None or not options.labelled_only):
            found.append(number)
    if not found:
        raise InputError(
            f"none of the {len(rows)} rows is left to measure with min_sentences ="
            f" {options.min_sentences}, labelled_only = {options.labelled_only}, candidates ="
            f" {options.candidates}. Ask for less, or give other rows."
        )
    return np.array(found, np.int64)


def scores_of(tables: Mapping[str, pa.Table], data: Labelled, chosen: Ints) -> Scores:
    """`context_scores` tables by method as arrays: the chosen rows, and the others apart.

    Raises
    ------
    StoreError
        A table was made from other rows than `data`.
    """
    sentence, passage, strange = {}, {}, {}
    starts = np.searchsorted(data.passage, np.arange(len(data.question)))
    chars, place = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for method, table in tables.items():
        columns = {
            name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names
        }
        other = columns["other"].astype(np.bool_)
        own = ~other & np.isin(columns["row"], chosen)
        if not np.array_equal(columns["chars"][own], data.chars):
            raise StoreError(
                f"the scores of `{method}` were made from other sentences than the rows hold: the"
                " rows file changed while it was evaluated. Run again."
            )
        sentence[method] = columns["score"][own].astype(np.float64)
        if other.any():
            strange[method] = columns["score"][other].astype(np.float64)
            chars = columns["chars"][other]
            place = np.unique(columns["row"][other], return_inverse=True)[1].astype(np.int64)
        if not table.column("rank").null_count:
            passage[method] = columns["rank"][own][starts].astype(np.float64)
    return Scores(sentence, passage, strange, chars, place)


EVALUATE = StepSpec(
    name="evaluate_context",
    version=1,
    options=_MeasureOptions,
    inputs={name: Slot(("context_scores",), optional=True) for name in METHOD_NAMES},
    plan=_plan,
    shard=_shard,
    finish=_finish,
    about="Evidence kept against characters removed, and the other figures of context pruning.",
)
