"""Step `sweep`: the same signals decided at many budgets, for curves. No model runs here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from ...pruners.catalogue import METHODS
from ...storage import Table, row_id
from ..bundles import DECIDED_INPUTS, Bundle, baseline_masks, bundles, shard_of
from ..decisions import make_pruner
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec
from ..signal_columns import columns_for, signals_from

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        # The budget of the method that pruned; baselines are given what it kept there.
        pa.field("budget", pa.float64(), nullable=False),
        pa.field("chars_in", pa.int64(), nullable=False),
        pa.field("chars_out", pa.int64(), nullable=False),
        pa.field("sentences_kept", pa.int64(), nullable=False),
        pa.field("questions", pa.int64(), nullable=False),
        pa.field("answers_kept", pa.int64(), nullable=False),
    ]
)


class SweepOptions(StepOptions):
    """Options of `sweep`.

    Attributes
    ----------
    points
        How many budgets: quantiles of the scores for a threshold, even steps for a share.
    """

    points: int = Field(default=24, ge=2, le=200)


def plan(options: SweepOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard: the totals of all questions."""
    return Plan(SCHEMA, 1, options.model_dump())


def shard(job: Job, index: int, out: Rows) -> None:
    """Decide at each budget and count characters and answers, for the method and baselines.

    `questions` are those whose answer was retrieved; `answers_kept` those of them whose
    answer survives.
    """
    options: SweepOptions = job.options  # type: ignore[assignment]
    decision = job.input("decision")
    made = decision.manifest.options
    budgets = _budgets(made["method"], made["options"], decision, options.points)
    pruners = [make_pruner(made["method"], {**made["options"], **b}) for _, b in budgets]
    signals = job.input("signals")
    columns = columns_for(pruners[0], signals.schema.names)
    totals: dict[tuple[str, int], Counter[str]] = {}
    for number in signals.shards():
        rows = shard_of(signals, number)
        arrays = signals_from(rows, columns)
        masks = [pruner(arrays, seed=job.seed).keep for pruner in pruners]
        for bundle in bundles(rows, job.input("questions"), job.input("chunks")):
            for level, mask in enumerate(masks):
                _add(totals, made["method"], level, bundle, mask[slice(*bundle.rows)], job.seed)
    out.write(pa.Table.from_pylist(list(_rows(totals, budgets)), SCHEMA))


def _budgets(
    method: str, options: Mapping[str, Any], decision: Table, points: int
) -> list[tuple[float, dict[str, Any]]]:
    """(number to show, option) from the loosest to the tightest, the one decided at among them."""
    budget = METHODS[method].budget
    current = options.get(budget.field, getattr(make_pruner(method, options), budget.field))
    if budget.kind == "threshold":
        scores = [
            batch.column("score").to_numpy(zero_copy_only=False)
            for batch in decision.batches(columns=["score"])
        ]
        every = np.concatenate(scores) if scores else np.zeros(1, np.float32)
        levels = np.quantile(every, np.linspace(0, 1, points)) if len(every) else np.zeros(1)
        # Just under the lowest score keeps everything: the comparison is strict.
        lowest = float(np.nextafter(np.float32(levels[0]), np.float32(-np.inf)))
        found = {lowest, *map(float, levels), float(current)}
        low, high = _legal(method, budget.field)
        values: list[Any] = sorted(value for value in found if low <= value <= high)
    elif budget.kind == "count_per_group":
        values = sorted({*range(points), int(current)}, reverse=True)
    else:
        values = sorted({*np.linspace(0, 1, points).tolist(), float(current)}, reverse=True)
    return [(float(value), {budget.field: value}) for value in values]


def _legal(method: str, field: str) -> tuple[float, float]:
    """The range that the method accepts for its budget: [0, 1], or anything."""
    from ...errors import InputError

    try:
        make_pruner(method, {field: -1e-3})
    except InputError:
        return 0.0, 1.0
    return -np.inf, np.inf


def _add(
    totals: dict[tuple[str, int], Counter[str]],
    method: str,
    level: int,
    bundle: Bundle,
    keep: Any,
    seed: int,
) -> None:
    chars = bundle.chars
    limit = int(chars[keep].sum())
    masks = {**baseline_masks(bundle, limit, seed), method: keep}
    for name, mask in masks.items():
        count = totals.setdefault((name, level), Counter())
        count["chars_in"] += int(chars.sum())
        count["chars_out"] += int(chars[mask].sum())
        count["sentences_kept"] += int(mask.sum())
        if bundle.answerable:
            count["questions"] += 1
            count["answers_kept"] += bundle.survives(mask)


def _rows(
    totals: Mapping[tuple[str, int], Counter[str]], budgets: list[tuple[float, dict[str, Any]]]
) -> Any:
    names = ("chars_in", "chars_out", "sentences_kept", "questions", "answers_kept")
    for (method, level), count in sorted(totals.items(), key=lambda item: item[0]):
        budget = budgets[level][0]
        yield {
            "id": row_id(method, repr(budget)),
            "method": method,
            "budget": budget,
            **{name: int(count[name]) for name in names},
        }


SPEC = StepSpec(
    name="sweep",
    version=1,
    options=SweepOptions,
    inputs=DECIDED_INPUTS,
    plan=plan,
    shard=shard,
    about="The same signals decided at many budgets, for curves.",
)
