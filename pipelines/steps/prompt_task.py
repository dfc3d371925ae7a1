"""Step `prompt_task`: what is asked, and the few rows that it is asked on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ...errors import InputError
from ...storage import Table
from ..dataset_tables import TEST
from ..engine import Job, Plan, Rows, Slot, StepContext, StepSpec
from ..prompts.draw import draw_parts
from ..prompts.tables import TASK
from ..prompts.task import PromptTaskOptions


def plan(options: PromptTaskOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard; the task's options and the digests of its model in the key.

    Raises
    ------
    InputError
        The data is not text, or has fewer than two classes.
    RecipeError
        The words for the classes do not fit them.
    ModelError
        The model cannot be found.
    """
    from ..prompts.boxes import box_digests

    data = inputs["data"]
    notes: Mapping[str, Any] = data.manifest.notes
    if notes.get("kind") != "text":
        raise InputError(
            f"table `{data.manifest.name}`: expected labelled texts, found"
            f" {notes.get('kind') or 'no kind'}. Read a data set of texts, or set `kind: text` and"
            " `text_field` of `read_dataset`."
        )
    classes = [str(name) for name in notes["classes"]]
    if len(classes) < 2:
        raise InputError(
            f"table `{data.manifest.name}`: expected at least 2 classes, found"
            f" {', '.join(classes) or 'none'}. Look at `label_field` of `read_dataset`."
        )
    options.words(classes)
    return Plan(
        TASK,
        1,
        options.identity(),
        models=box_digests(options),
        payload=classes,
        notes={"classes": classes, "data": data.manifest.name},
    )


def shard(job: Job, index: int, out: Rows) -> None:
    """Draw the parts from all rows; a text of white space alone is a bad row."""
    options: PromptTaskOptions = job.options  # type: ignore[assignment]
    columns = ["id", "source", "split", "label", "text"]
    rows = _without_blank(job.input("data").to_table(columns), out)
    ids = rows.column("id").to_numpy().astype(np.int64)
    texts = rows.column("text").to_pylist()
    made = draw_parts(
        ids,
        rows.column("label").to_numpy().astype(np.int64),
        np.array(rows.column("split").to_pylist(), object) == TEST,
        texts,
        job.plan.payload,
        shots=options.shots,
        validation_shots=options.validation_shots,
        test_rows=options.test_rows,
        draw=options.draw,
        seed=job.seed,
    )
    columns_made = [
        [int(ids[row.row]) for row in made.rows],
        [row.part for row in made.rows],
        [row.shot for row in made.rows],
        [row.label for row in made.rows],
        [texts[row.row] for row in made.rows],
    ]
    out.write(
        pa.table(
            [pa.array(c, f.type) for c, f in zip(columns_made, TASK, strict=True)], schema=TASK
        )
    )
    out.count(len(made.rows), made.dropped)


def _without_blank(rows: pa.Table, out: Rows) -> pa.Table:
    full = []
    for record in rows.select(["id", "source", "text"]).to_pylist():
        full.append(bool(record["text"].strip()))
        if not full[-1]:
            out.reject(record, "expected text, found white space.", f"{record['source']}, text")
    return rows.filter(pa.array(full, pa.bool_()))


SPEC = StepSpec(
    name="prompt_task",
    version=1,
    options=PromptTaskOptions,
    inputs={"data": Slot(("read_dataset",))},
    plan=plan,
    shard=shard,
    about="A task to find a prompt for: a black box, and few labelled texts to search, judge and"
    " test on.",
)
