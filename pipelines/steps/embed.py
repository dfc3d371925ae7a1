"""Step `embed`: one unit vector a passage, chat or text, by sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...storage import Table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import encoder, sentence_encoder
from ..reuse import RowWise

_ROWS_A_BATCH = 1024
# What is embedded of the rows of each step.
_COLUMNS = {"chunk": ("title", "text"), "read_chats": ("messages",), "read_dataset": ("text",)}


class EmbedOptions(StepOptions):
    """Options of `embed`.

    Attributes
    ----------
    encoder
        A sentence-transformers model: folder, hub id, or the packaged all-MiniLM-L6-v2.
    title
        Put the title on a line before the text.
    batch_size
        Texts a forward pass. Padding changes the last bits of a vector, so it enters the key.
    device
        cpu, cuda …; None takes what there is.
    """

    encoder: str = "all-MiniLM-L6-v2"
    title: bool = True
    batch_size: int = Field(default=32, ge=1, le=4096)
    device: str | None = None


def plan(options: EmbedOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """One shard for each shard of the passages."""
    resolved = encoder(options.encoder)
    model = sentence_encoder(str(resolved.path), options.device)
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), model.dimension), nullable=False),
        ]
    )
    source = inputs["chunks"].manifest
    if source.step == "read_dataset" and source.notes["kind"] != "text":
        raise RecipeError(
            f"embed needs rows of text; `{source.name}` holds rows of kind {source.notes['kind']}."
            " Take the vectors of a teacher_outputs step instead."
        )
    shards = inputs["chunks"].shards()
    identity = options.model_dump(exclude={"device", "encoder"})
    return Plan(
        schema,
        len(shards),
        identity,
        {"encoder": resolved.sha256},
        payload=shards,
        notes={"encoder": options.encoder},
    )


def read(job: Job, index: int) -> Iterator[pa.Table]:
    """Passages of one shard, in its order."""
    source = job.input("chunks")
    for batch in source.shard_batches(job.plan.payload[index], columns=_read(job)):
        for start in range(0, batch.num_rows, _ROWS_A_BATCH):
            yield pa.Table.from_batches([batch.slice(start, _ROWS_A_BATCH)])


def find(job: Job, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Passages with these ids."""
    return job.input("chunks").lookup(ids, columns=_read(job), missing="skip")


def _read(job: Job) -> list[str]:
    return ["id", *_COLUMNS[job.input("chunks").manifest.step]]


def score(job: Job, rows: pa.Table, out: Rows) -> None:
    """Embed some passages."""
    options: EmbedOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    model = sentence_encoder(str(encoder(options.encoder).path), options.device)
    texts = _texts(job.input("chunks").manifest.step, rows, options.title)
    vectors = model.encode(texts, batch_size=options.batch_size)
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]
    )
    out.write(pa.Table.from_arrays([rows.column("id"), values], schema=job.plan.schema))
    out.count(rows.num_rows, {})


def _texts(step: str, rows: pa.Table, titled: bool) -> list[str]:
    if step == "read_chats":
        return _chats(rows)
    if step == "chunk":
        return _passages(rows, titled)
    texts: list[str] = rows.column("text").to_pylist()
    return texts


def _passages(rows: pa.Table, titled: bool) -> list[str]:
    titles, texts = rows.column("title").to_pylist(), rows.column("text").to_pylist()
    return [
        f"{title}\n{text}" if titled and title else text
        for title, text in zip(titles, texts, strict=True)
    ]


def _chats(rows: pa.Table) -> list[str]:
    """Messages one below the other, without their roles."""
    return [
        "\n".join(message["content"] for message in messages if message["content"])
        for messages in rows.column("messages").to_pylist()
    ]


ROWS = RowWise(("chunks",), read, find, score)
SPEC = StepSpec(
    name="embed",
    version=1,
    options=EmbedOptions,
    inputs={"chunks": Slot(tuple(_COLUMNS))},
    plan=plan,
    shard=ROWS.make,
    row_wise=ROWS,
    about="One unit vector a passage, chat or text.",
)
