"""Step `test_prompts`: whether the found prompt is taken, and what it is worth on unseen rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...errors import InputError
from ...storage import Table, TableWriter
from ..engine import Job, Plan, Slot, StepContext, StepSpec, use_threads, write_whole
from ..prompts.asking import AskOptions
from ..prompts.contest import contest
from ..prompts.tables import TEST, VALIDATION, VERDICT
from ..prompts.task import task_of
from ..prompts.verdict import Judge
from ..prompts.words import rows_of


class TestPromptsOptions(AskOptions):
    """Options of `test_prompts`, beside those of every step that asks.

    Attributes
    ----------
    judge
        What the found prompt must be better in on the validation rows: the mean log_likelihood
        of the gold class, or accuracy. On 32 to 96 rows a standard error of the accuracy is
        several points, and a guard by it turns down more prompts that are better on the test
        rows (benchmarks/RESULTS.md, "The guard").
    finalists
        Prompts with the highest training reward among which the validation rows pick. Above 1
        the lead of the one picked is a little flattered.
    """

    __test__ = False  # no class of tests, whatever its name says

    judge: Judge = "log_likelihood"
    finalists: int = Field(default=1, ge=1)


def plan(options: TestPromptsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: a few prompts on the rows that nothing has seen."""
    from ..prompts.boxes import box_digests

    return Plan(VERDICT, None, options.identity(), models=box_digests(task_of(inputs["task"])))


def finish(job: Job, writer: TableWriter) -> None:
    """Ask about the contenders on both parts, judge by one, report both.

    Raises
    ------
    InputError
        The task has no validation rows, or the search found nothing.
    BudgetError
        The budget does not reach.
    """
    from ..prompts.boxes import open_asker, warn_unseen

    options: TestPromptsOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    task = job.input("task")
    parts = {name: rows_of(task, name) for name in (VALIDATION, TEST)}
    if not parts[VALIDATION].texts:
        raise InputError(
            f"`{task.manifest.name}` has no validation rows, so nothing can be judged. Set"
            " `validation_shots` of prompt_task."
        )
    asker = open_asker(task, [text for part in parts.values() for text in part.texts], options)
    rows = contest(
        asker,
        parts,
        finalists=finalists(job.input("search"), options.finalists),
        manual=task_of(task).manual.strip(),
        control=finalists(job.input("control"), 1)[0] if job.has("control") else None,
        judge=options.judge,
        seed=job.seed,
    )
    warn_unseen(asker)
    write_whole(writer, pa.Table.from_pylist(rows, VERDICT))


def finalists(search: Table, count: int) -> list[str]:
    """The best prompts of a search by training reward, then by accuracy, then the first asked."""
    found = search.to_table(["prompt", "reward", "accuracy"])
    reward = found.column("reward").to_numpy()
    if not len(reward):
        raise InputError(
            f"`{search.manifest.name}` asked about no prompt. Give it a larger budget."
        )
    order = np.lexsort((np.arange(len(reward)), -found.column("accuracy").to_numpy(), -reward))
    prompts = found.column("prompt").to_pylist()
    return list(dict.fromkeys(prompts[place] for place in order))[:count]


SPEC = StepSpec(
    name="test_prompts",
    version=1,
    options=TestPromptsOptions,
    inputs={
        "task": Slot(("prompt_task",)),
        "search": Slot(("search_prompts",)),
        "control": Slot(("search_prompts",), optional=True),
    },
    plan=plan,
    finish=finish,
    about="Whether the found prompt is taken, and what it is worth on rows never used.",
)
