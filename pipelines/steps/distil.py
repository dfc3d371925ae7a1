"""Step `distil`: students of the kept rows, with and without their teacher, beside random rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...storage import Table
from ..dataset_tables import STUDENTS
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec, use_threads
from ..students import (
    STUDENT_INPUTS,
    StudentOptions,
    chosen_alphas,
    decision_options,
    line_id,
    open_classroom,
    seeds_of,
    train_and_score,
)


class DistilOptions(StudentOptions):
    """Options of `distil`.

    Attributes
    ----------
    alpha
        Weight of the teacher's part of the loss, 0 to 1: a number, or "auto" for what
        sweep_alpha found at each fraction (input `alphas`).
    seeds
        Students of each cell. The seed moves the student's start, its batches, and what the
        selection draws.
    """

    alpha: float | Literal["auto"] = "auto"
    seeds: int = Field(default=3, ge=1)


Cell = tuple[str, float, bool, float]


def plan(options: DistilOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each cell of the grid and seed."""
    decision_options(inputs["decision"])
    cells = [
        (name, fraction, distilled, _alpha(options, inputs, name, fraction) if distilled else 0.0)
        for name, fraction in options.lines()
        for distilled in (False, True)
    ]
    payload = [(*cell, seed) for cell in cells for seed in seeds_of(context.seed, options.seeds)]
    return Plan(STUDENTS, len(payload), options.model_dump(exclude={"device"}), payload=payload)


def _alpha(
    options: DistilOptions, inputs: Mapping[str, Table], selection: str, fraction: float
) -> float:
    if options.alpha != "auto":
        if not 0.0 <= options.alpha <= 1.0:
            raise RecipeError(f'`alpha` lies in [0, 1], or is "auto"; found {options.alpha}.')
        return options.alpha
    if "alphas" not in inputs:
        raise RecipeError(
            "`alpha: auto` takes the weight that a sweep_alpha step found: give the step an input"
            " `alphas`, or a number."
        )
    found = chosen_alphas(inputs["alphas"])
    if (selection, round(fraction, 6)) not in found:
        raise RecipeError(
            f"`{inputs['alphas'].manifest.name}` has no weight for {selection} rows at a fraction"
            f" of {fraction}; give both steps the same `fractions`."
        )
    return found[selection, round(fraction, 6)]


def shard(job: Job, index: int, out: Rows) -> None:
    """Train and judge one student."""
    options: DistilOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    room = open_classroom(job)
    selection, fraction, distilled, alpha, seed = job.plan.payload[index]
    kept, teacher = room.part(room.mask(selection, fraction, seed))
    score = train_and_score(options, kept, teacher, room.test, alpha=alpha, seed=seed)
    row = {
        "id": line_id(selection, fraction, distilled, seed),
        "fraction": fraction,
        "selection": selection,
        "distilled": distilled,
        "seed": seed,
        "alpha": alpha,
        "temperature": options.temperature,
        "rows": len(kept.ids),
        "steps": options.steps,
        "accuracy": score.accuracy,
        "worst_class_accuracy": score.worst_class,
    }
    out.write(pa.Table.from_pylist([row], STUDENTS))
    out.count(1, {})


SPEC = StepSpec(
    name="distil",
    version=1,
    options=DistilOptions,
    inputs=STUDENT_INPUTS | {"alphas": Slot(("sweep_alpha",), optional=True)},
    plan=plan,
    shard=shard,
    about="Students of the kept rows, with and without a teacher, beside random rows.",
)
