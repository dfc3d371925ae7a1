"""How good context pruning is on labelled rows: `prunery evaluate context`.

Two steps, each a table in the store. `context_scores` runs the models once over the rows and
keeps every method's score of every sentence; `evaluate_context` makes the figures from those
scores alone, so that other thresholds, budgets or resamples cost no model run. The report is
attached to the second table as `report.json` and `report.md`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from ..errors import RecipeError, StoreError
from ..storage import Store, Table, TableWriter, row_id
from .context_metrics import Labelled
from .context_quality import Quality, Scores, Settings, measure
from .context_scores import METHOD_NAMES, PROBABILITIES, SCORES, ScoreOptions
from .engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec
from .evaluation_rows import cached_rows, flatten
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
    """

    threshold: float | None = Field(None, ge=0, lt=1)
    thresholds: list[float] = Field(
        default=[0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    targets: list[float] = Field(default=[0.5, 0.59, 0.7])
    best_k: list[int] = Field(default=[1, 2, 3])
    resamples: int = Field(2000, ge=1)

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


class EvaluateContextOptions(ScoreOptions, FigureOptions):
    """Everything that `evaluate_context` needs: the rows, the methods, what to measure at."""

    paths: ClassVar[tuple[str, ...]] = ("rows",)
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

    def to_markdown(self) -> str:
        """Tables for a person."""
        return to_markdown(self.name, self.summary, self.quality)


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
    context = StepContext(
        store=store,
        name=f"{options.name}-scores",
        seed=options.seed,
        workers=workers,
        threads=threads,
        progress=progress or Silent(),
    )
    scored = SCORES(_only(options, ScoreOptions), {}, context)
    measured = EVALUATE(
        _only(options, _MeasureOptions),
        {"scores": scored.key},
        StepContext(store=store, name=f"{options.name}-quality", seed=options.seed),
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


_Kind = TypeVar("_Kind", bound=StepOptions)


def _only(options: StepOptions, kind: type[_Kind]) -> _Kind:
    return kind(**{name: getattr(options, name) for name in kind.model_fields})


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
    options, scores = _options(job), job.input("scores")
    data = flatten(cached_rows(options.rows)).data
    summary = {
        "questions": data.questions,
        "passages": len(data.question),
        "sentences": len(data.passage),
        "characters": int(data.chars.sum()),
        "labelled_questions": len(np.unique(data.owner[data.label == 1])),
        "answerable_questions": len(np.unique(data.span_question)),
        "threshold": _threshold(options, scores),
        "resamples": options.resamples,
        "seed": job.seed,
        "model": dict(scores.manifest.notes),
        "digests": dict(scores.manifest.models),
        "libraries": dict(scores.manifest.libraries),
        "scores_key": scores.key,
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


def _threshold(options: FigureOptions, scores: Table) -> float:
    if options.threshold is not None:
        return options.threshold
    return float(scores.manifest.notes.get("threshold", 0.5))


_made: dict[str, Quality] = {}  # of the one key that this process measured last


def _quality(job: Job) -> Quality:
    if job.key not in _made:
        options, table = _options(job), job.input("scores")
        data = flatten(cached_rows(options.rows)).data
        settings = Settings(
            main=MAIN,
            threshold=_threshold(options, table),
            thresholds=tuple(options.thresholds),
            targets=tuple(options.targets),
            best_k=tuple(options.best_k),
            resamples=options.resamples,
            seed=job.seed,
            probabilities=PROBABILITIES,
        )
        _made.clear()
        _made[job.key] = measure(data, scores_of(table.to_table(), data), settings)
    return _made[job.key]


def scores_of(rows: pa.Table, data: Labelled) -> Scores:
    """The columns of a `context_scores` table as arrays, split into own and other passages.

    Raises
    ------
    StoreError
        The table was made from other rows than `data`.
    """
    other = rows.column("other").to_numpy(zero_copy_only=False).astype(np.bool_)
    if int((~other).sum()) != len(data.passage):
        raise StoreError(
            f"the scores hold {int((~other).sum())} sentences, the rows {len(data.passage)}: the"
            " rows file changed after it was scored. Score it again, under another name."
        )
    sentence, passage, strange = {}, {}, {}
    starts = np.searchsorted(data.passage, np.arange(len(data.question)))
    for method in METHOD_NAMES:
        column = rows.column(method)
        if column.null_count == 0:
            values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            sentence[method] = values[~other]
            if other.any():
                strange[method] = values[other]
        ranked = rows.column(f"rank_{method}") if f"rank_{method}" in rows.column_names else None
        if ranked is not None and ranked.null_count == 0:
            values = ranked.to_numpy(zero_copy_only=False).astype(np.float64)
            passage[method] = values[~other][starts]
    number = rows.column("row").to_numpy(zero_copy_only=False)[other]
    return Scores(
        sentence=sentence,
        passage=passage,
        other=strange,
        other_chars=rows.column("chars").to_numpy(zero_copy_only=False)[other],
        other_passage=np.unique(number, return_inverse=True)[1].astype(np.int64),
    )


EVALUATE = StepSpec(
    name="evaluate_context",
    version=1,
    options=_MeasureOptions,
    inputs={"scores": Slot(("context_scores",))},
    plan=_plan,
    shard=_shard,
    finish=_finish,
    about="Evidence kept against characters removed, and the other figures of context pruning.",
)
