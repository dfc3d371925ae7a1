"""Step `sweep_alpha`: how much a student should listen to its teacher, at each fraction.

For every line of the grid short trainings at five weights are judged on a held-out part of the
kept rows themselves: the test split plays no part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pydantic import Field

from ...storage import Table
from ..dataset_tables import ALPHAS
from ..engine import Job, Plan, Rows, StepContext, StepSpec, use_threads
from ..students import (
    STUDENT_INPUTS,
    StudentOptions,
    decision_options,
    line_id,
    open_classroom,
    seeds_of,
    sweep_alpha,
)


class SweepAlphaOptions(StudentOptions):
    """Options of `sweep_alpha`.

    Attributes
    ----------
    short
        Share of `steps` that a training of the sweep takes.
    held_out
        Share of the kept rows that the weights are judged on.
    seeds
        Trainings of each weight.
    """

    short: float = Field(default=0.5, gt=0, le=1)
    held_out: float = Field(default=0.2, gt=0, lt=1)
    seeds: int = Field(default=1, ge=1)


def plan(options: SweepAlphaOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """A shard for each line of the grid."""
    decision_options(inputs["decision"])
    lines = options.lines()
    return Plan(ALPHAS, len(lines), options.model_dump(exclude={"device"}), payload=lines)


def shard(job: Job, index: int, out: Rows) -> None:
    """Train a line's short students and choose its weight."""
    options: SweepAlphaOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    selection, fraction = job.plan.payload[index]
    found = sweep_alpha(
        open_classroom(job),
        options,
        selection,
        fraction,
        share=options.held_out,
        steps=max(1, round(options.short * options.steps)),
        seeds=seeds_of(job.seed, options.seeds),
    )
    rows = [
        {
            "id": line_id("alpha", selection, fraction, alpha, seed),
            "fraction": fraction,
            "selection": selection,
            "alpha": alpha,
            "accuracy": accuracy,
            "seed": seed,
            "used": alpha == found.used,
        }
        for (alpha, seed), accuracy in found.accuracy.items()
    ]
    out.write(pa.Table.from_pylist(rows, ALPHAS))
    out.count(len(rows), {})


SPEC = StepSpec(
    name="sweep_alpha",
    version=1,
    options=SweepAlphaOptions,
    inputs=STUDENT_INPUTS,
    plan=plan,
    shard=shard,
    about="How much a student should listen to its teacher, at each fraction.",
)
