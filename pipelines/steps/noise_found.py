"""Step `noise_found`: how many of the labels known to be wrong each score finds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ...errors import RecipeError
from ...pruners.contract import FloatArray, Signals
from ...pruners.sample.difficulty import DIFFICULTY, difficulty_needs, difficulty_of
from ...storage import Table, row_id
from ..dataset_signals import INPUTS, check, gather, training_rows
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


def _needs(name: str) -> frozenset[str]:
    return frozenset({name}) if name in _TURN else difficulty_needs(name)


def _harder(name: str, signals: Signals, runs: int) -> FloatArray:
    if name in _TURN:
        return (_TURN[name] * signals[name]).astype(np.float32)
    return difficulty_of(name, signals, runs=runs)


def _is_there(name: str, inputs: Mapping[str, Table]) -> bool:
    try:
        check(_needs(name), inputs, name)
    except RecipeError:
        return False
    return True


def shard(job: Job, index: int, out: Rows) -> None:
    """Judge each score by the labels that were planted; no rows where none were."""
    inputs = {role: job.input(role) for role in INPUTS if job.has(role)}
    rows = training_rows(inputs["data"])
    made = []
    if rows.flipped.any():
        wanted = frozenset().union(*(_needs(name) for name in job.plan.payload))
        signals, runs = gather(wanted, inputs, rows)
        scores = {name: _harder(name, signals, runs) for name in job.plan.payload}
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
