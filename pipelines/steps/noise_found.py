"""Step `noise_found`: how many of the labels known to be wrong each score finds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ...errors import RecipeError
from ...pruners.contract import FloatArray
from ...pruners.sample.difficulty import DIFFICULTY, difficulty_of
from ...storage import Table, row_id
from ..dataset_signals import INPUTS, check, expand, gather, training_rows
from ..dataset_tables import NOISE
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec
from ..noise_figures import noise_rows

# Signals that are a score themselves, and what turns them so that higher is harder.
_TURN = {"shapley": -1.0, "centroid_distance": 1.0}


class NoiseFoundOptions(StepOptions):
    """There is nothing to set: every score is judged whose signals the inputs hold."""


def plan(options: NoiseFoundOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard."""
    scores = [name for name in (*DIFFICULTY, *_TURN) if _is_there(name, inputs)]
    return Plan(NOISE, 1, {"scores": scores}, payload=scores)


def _is_there(name: str, inputs: Mapping[str, Table]) -> bool:
    try:
        check({name} if name in _TURN else expand({"difficulty"}, name), inputs, name)
    except RecipeError:
        return False
    return True


def shard(job: Job, index: int, out: Rows) -> None:
    """Judge each score by the labels that were planted; no rows where none were."""
    inputs = {role: job.input(role) for role in INPUTS if job.has(role)}
    rows = training_rows(inputs["data"])
    made = []
    if rows.flipped.any():
        scores: dict[str, FloatArray] = {}
        for name in job.plan.payload:
            needs = {name} if name in _TURN else expand({"difficulty"}, name)
            signals, runs = gather(needs, inputs, rows)
            if name in _TURN:
                scores[name] = (_TURN[name] * signals[name]).astype(np.float32)
            else:
                scores[name] = difficulty_of(name, signals, runs=runs)
        made = noise_rows(scores, rows.flipped, ids=rows.ids)
    found = [{"id": row_id("noise", row["score"]), **row} for row in made]
    out.write(pa.Table.from_pylist(found, NOISE))
    out.count(len(found), {})


SPEC = StepSpec(
    name="noise_found",
    version=1,
    options=NoiseFoundOptions,
    inputs=INPUTS,
    plan=plan,
    shard=shard,
    about="How many of the labels known to be wrong each score finds.",
)
