"""Step `train_lm`: a small language model of the chats, for runs without a model of one's own.

A hub id or a folder in the options of the later steps replaces it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...storage import Table, TableWriter, row_id
from ..engine import Job, Plan, Slot, StepContext, StepOptions, StepSpec, use_threads, write_whole

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
    ]
)


class TrainLmOptions(StepOptions):
    """Options of `train_lm`.

    Attributes
    ----------
    vocab_size
        Entries of the tokenizer, at most; 256 bytes and 4 special tokens are among them.
    hidden_size, layers, heads
        Sizes of the Llama.
    max_length
        Tokens of a training window; windows hold several chats. Rotary positions reach on to
        2048 for longer samples.
    steps, batch_tokens
        Optimiser steps, and tokens in each. A number of steps and not of seconds, so that the
        model is the same again.
    learning_rate
        Peak of AdamW's.
    checkpoints
        Earlier states kept beside the final one, after equal parts of the steps.
    """

    vocab_size: int = Field(default=2048, ge=300, le=65_536)
    hidden_size: int = Field(default=160, ge=8, le=4096)
    layers: int = Field(default=3, ge=1, le=64)
    heads: int = Field(default=4, ge=1, le=64)
    max_length: int = Field(default=256, ge=8, le=2048)
    steps: int = Field(default=400, ge=1, le=1_000_000)
    batch_tokens: int = Field(default=1024, ge=8, le=1_048_576)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    checkpoints: int = Field(default=2, ge=0, le=32)


def plan(options: TrainLmOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """No shards of its own: the model is one piece, made by `finish`."""
    if options.hidden_size % (2 * options.heads):
        raise RecipeError(
            f"train_lm: expected `hidden_size` to be a multiple of twice `heads`; found"
            f" {options.hidden_size} and {options.heads}."
        )
    if options.steps <= options.checkpoints:
        raise RecipeError(
            f"train_lm: expected more `steps` than `checkpoints`; found {options.steps} and"
            f" {options.checkpoints}."
        )
    notes = {"chats": inputs["chats"].manifest.name}
    return Plan(SCHEMA, None, options.model_dump(), notes=notes)


def finish(job: Job, writer: TableWriter) -> None:
    """Train, attach the model's files, and write a row for each point of the log.

    A run that is stopped leaves nothing: the next one trains from the start.
    """
    from ..train_lm import Shape, files_of, train_causal

    options: TrainLmOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    with tempfile.TemporaryDirectory(prefix="prunery-lm-") as folder:
        log = train_causal(
            _messages(job.input("chats")),
            Shape(**options.model_dump()),
            Path(folder),
            seed=job.seed,
        )
        for name, path in files_of(Path(folder)).items():
            writer.attach(name, path)
    rows = [{"id": row_id("train_lm", point.step), **asdict(point)} for point in log]
    write_whole(writer, pa.Table.from_pylist(rows, SCHEMA))


def _messages(chats: Table) -> list[list[dict[str, Any]]]:
    return [
        messages
        for batch in chats.batches(columns=["messages"])
        for messages in batch.column("messages").to_pylist()
    ]


SPEC = StepSpec(
    name="train_lm",
    version=1,
    options=TrainLmOptions,
    inputs={"chats": Slot(("read_chats",))},
    plan=plan,
    finish=finish,
    about="A small language model of the chats, with checkpoints, for runs without one.",
)
