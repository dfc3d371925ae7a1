"""Run a recipe in plain Python: one step after the other, each at most once for its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import Manifest, Store
from .engine import StepContext, WorkerPool
from .progress import Progress, Silent
from .prompts.outcome import outcome, outcome_lines
from .recipe import Recipe, Step
from .run_totals import (
    dataset_totals,
    fate,
    model_lines,
    model_totals,
    selection_totals,
    totals,
)
from .steps import STEPS
from .student_figures import Grid, summary, summary_lines
from .workers import Workers

REPORTS = ("report", "report_sft", "report_dataset", "report_prompts", "report_compression")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run made: the manifest of each step by the step's name, in order."""

    recipe: str
    store: Store
    manifests: Mapping[str, Manifest]

    def of_step(self, step: str) -> Manifest | None:
        """The manifest of the last step of that kind, if the recipe has one."""
        found = [m for m in self.manifests.values() if m.step == step]
        return found[-1] if found else None

    @property
    def report(self) -> Path | None:
        """The HTML report, a file on this machine, if the recipe makes one."""
        found = [self.of_step(step) for step in REPORTS]
        manifest = next((m for m in found if m is not None), None)
        return self.store.table(manifest.key).attachment("report.html") if manifest else None

    def as_json(self) -> dict[str, Any]:
        """Keys, counts, totals and one row a question, as plain values."""
        report = self.report
        return {
            "recipe": self.recipe,
            "store": str(self.store.uri),
            "steps": {
                name: {
                    "step": m.step,
                    "key": m.key,
                    "logical_digest": m.logical_digest,
                    "rows": m.rows,
                    "kept": m.kept,
                    "dropped": dict(m.dropped),
                    "rejected": m.rejected,
                }
                for name, m in self.manifests.items()
            },
            "totals": self.totals(),
            "questions": self._questions(),
            "selections": self.selections(),
            "students": self.students(),
            "prompts": self.prompts(),
            "models": self.models(),
            "report": str(report) if report else None,
        }

    def totals(self) -> dict[str, Any] | None:
        """Sums over the questions of the evaluate step, if there is one."""
        rows = self._questions()
        if not rows:
            return None
        return totals(rows)

    def selections(self) -> dict[str, dict[str, int]]:
        """What was there before and after each `prune_sft` and `prune_dataset`, by its name.

        Samples and trained tokens of the first, training rows and classes of the second.
        """
        made = {}
        for name, m in self.manifests.items():
            if m.step == "prune_sft":
                made[name] = selection_totals(self.store.table(m.key))
            elif m.step == "prune_dataset":
                data = next(p for p in self.store.lineage(m.key) if p.step == "read_dataset")
                made[name] = dataset_totals(self.store.table(m.key), self.store.table(data.key))
        return made

    def students(self) -> dict[str, list[dict[str, Any]]]:
        """Mean accuracy of the students of each `distil` step by its name, with its interval.

        A row for each kept fraction, selection and kind of training: see
        `student_figures.summary`.
        """
        return {
            name: summary(Grid(self.store.table(m.key).to_table().to_pylist()))
            for name, m in self.manifests.items()
            if m.step == "distil"
        }

    def prompts(self) -> dict[str, dict[str, Any]]:
        """The prompt that each `test_prompts` step takes, by its name; see `prompts.outcome`."""
        return {
            name: outcome(self.store, m)
            for name, m in self.manifests.items()
            if m.step == "test_prompts"
        }

    def models(self) -> dict[str, list[dict[str, Any]]]:
        """What each `verify_compression` step found of its models, by its name."""
        return {
            name: model_totals(self.store.table(m.key))
            for name, m in self.manifests.items()
            if m.step == "verify_compression"
        }

    def lines(self) -> list[str]:
        """The result in words: a line a step, a line a question, totals, the report's path."""
        made = [
            f"{name}: {m.rows} rows" + _counts(m.kept, m.dropped, m.rejected)
            for name, m in self.manifests.items()
        ]
        made += _selection_lines(self.selections())
        for name, students in self.students().items():
            made += ["", *(f"{name}: {line}" for line in summary_lines(students))]
        for name, found in self.prompts().items():
            made += ["", *outcome_lines(name, found)]
        for name, judged in self.models().items():
            made += ["", *(f"{name}: {line}" for line in model_lines(judged))]
        rows = self._questions()
        if rows:
            made += ["", *_question_lines(rows), "", *_total_lines(totals(rows))]
        if self.report:
            made += ["", f"report: {self.report}"]
        return made

    def _questions(self) -> list[dict[str, Any]]:
        manifest = self.of_step("evaluate")
        if manifest is None:
            return []
        rows: list[dict[str, Any]] = self.store.table(manifest.key).to_table().to_pylist()
        return rows


def run_recipe(
    recipe: Recipe,
    store: Store,
    *,
    progress: Progress | None = None,
    workers: Workers | int = 1,
    threads: int | None = None,
    reuse: bool = True,
) -> RunResult:
    """Run every step whose table does not exist yet, in order.

    Parameters
    ----------
    workers
        Who shares the shards of a step: so many processes, or `Workers` of another kind.
    threads
        Threads that each gives to its models; None leaves the libraries' default. Not with
        `Workers`, which say it themselves.
    reuse
        Take rows that an earlier table of a step holds for the same input rows: see `reuse`.

    Raises
    ------
    PruneryError
        A step failed; what was done before it is kept and not repeated by the next run.
    """
    manifests: dict[str, Manifest] = {}
    if not isinstance(workers, Workers):
        workers = Workers(count=workers, threads=threads)
    with workers.open() as pool:
        for step in recipe.steps:
            context = context_of(
                recipe,
                step,
                store,
                progress=progress,
                workers=workers.count,
                threads=workers.threads,
                pool=pool,
                reuse=reuse,
            )
            inputs = {role: manifests[name].key for role, name in step.inputs.items()}
            manifests[step.name] = STEPS[step.step](step.options, inputs, context)
    return RunResult(recipe.name, store, manifests)


def context_of(
    recipe: Recipe,
    step: Step,
    store: Store,
    *,
    progress: Progress | None = None,
    workers: int = 1,
    threads: int | None = None,
    pool: WorkerPool | None = None,
    reuse: bool = True,
) -> StepContext:
    """The context in which a recipe runs one of its steps."""
    return StepContext(
        store=store,
        name=step.name,
        seed=recipe.seed,
        bad_rows=recipe.bad_rows,
        workers=workers,
        threads=threads,
        progress=progress or Silent(),
        pool=pool,
        reuse=reuse,
    )


def _counts(kept: int, dropped: Mapping[str, int], rejected: int) -> str:
    parts = [f"{n} {reason}" for reason, n in dropped.items()]
    if rejected:
        parts.append(f"{rejected} rejected")
    return f" ({kept} kept; {', '.join(parts)})" if parts else ""


def _selection_lines(selections: Mapping[str, Mapping[str, int]]) -> list[str]:
    made = []
    for name, n in selections.items():
        if "classes" in n:
            removed = 1 - n["rows_kept"] / n["rows"] if n["rows"] else 0.0
            made += [
                "",
                f"{name}: {n['rows']} -> {n['rows_kept']} rows ({removed:.0%} removed),"
                f" {n['classes_left']} of {n['classes']} classes left",
            ]
            continue
        removed = 1 - n["tokens_kept"] / n["tokens"] if n["tokens"] else 0.0
        made += [
            "",
            f"{name}: {n['samples']} -> {n['samples_kept']} samples, {n['tokens']} ->"
            f" {n['tokens_kept']} trained tokens ({removed:.0%} removed)",
        ]
    return made


def _question_lines(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["name"]) for row in rows)
    made = [f"{'':{width}}  {'tokens':>15}  {'removed':>7}  {'answer':<13}  question"]
    for row in rows:
        removed = 1 - row["tokens_out"] / row["tokens_in"] if row["tokens_in"] else 0.0
        before_after = f"{row['tokens_in']} -> {row['tokens_out']}"
        made.append(
            f"{row['name']:{width}}  {before_after:>15}  {removed:>7.0%}  {fate(row):<13}"
            f"  {row['question'][:70]}"
        )
    return made


def _total_lines(total: Mapping[str, Any]) -> list[str]:
    removed = 0.0 if not total["tokens_in"] else 1 - total["tokens_out"] / total["tokens_in"]
    made = [
        f"{total['questions']} questions, {total['tokens_in']} -> {total['tokens_out']} tokens"
        f" ({removed:.0%} removed)"
    ]
    if total["with_answers"]:
        made.append(
            f"answer retrieved for {total['answer_retrieved']} of {total['with_answers']}, and"
            f" kept for {total['answer_kept']} of those {total['answer_retrieved']}"
        )
        others = ", ".join(f"{name} {count}" for name, count in total["baselines"].items())
        if others:
            made.append(f"with as many characters kept by other methods: {others}")
    return made
