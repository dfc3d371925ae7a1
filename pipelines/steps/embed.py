"""Step `embed`: one unit vector a passage, chat or text, by sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pydantic import Field

from ...errors import RecipeError
from ...storage import Table
from ..engine import Job, Plan, Rows, Slot, StepContext, StepOptions, StepSpec, use_threads
from ..models import encoder, sentence_encoder

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


def shard(job: Job, index: int, out: Rows) -> None:
    """Embed the passages of one shard, in its order."""
    options: EmbedOptions = job.options  # type: ignore[assignment]
    use_threads(job.threads)
    model = sentence_encoder(str(encoder(options.encoder).path), options.device)
    source = job.input("chunks")
    kept = 0
    step = source.manifest.step
    columns = ["id", *_COLUMNS[step]]
    for batch in source.shard_batches(job.plan.payload[index], columns=columns):
        for start in range(0, batch.num_rows, _ROWS_A_BATCH):
            part = batch.slice(start, _ROWS_A_BATCH)
            texts = _texts(step, part, options.title)
            vectors = model.encode(texts, batch_size=options.batch_size)
            values = pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]
            )
            out.write(pa.Table.from_arrays([part.column("id"), values], schema=job.plan.schema))
            kept += part.num_rows
    out.count(kept, {})


def _texts(step: str, rows: pa.RecordBatch, titled: bool) -> list[str]:
    if step == "read_chats":
        return _chats(rows)
    if step == "chunk":
        return _passages(rows, titled)
    texts: list[str] = rows.column("text").to_pylist()
    return texts


def _passages(rows: pa.RecordBatch, titled: bool) -> list[str]:
    titles, texts = rows.column("title").to_pylist(), rows.column("text").to_pylist()
    return [
        f"{title}\n{text}" if titled and title else text
        for title, text in zip(titles, texts, strict=True)
    ]


def _chats(rows: pa.RecordBatch) -> list[str]:
    """Messages one below the other, without their roles."""
    return [
        "\n".join(message["content"] for message in messages if message["content"])
        for messages in rows.column("messages").to_pylist()
    ]


SPEC = StepSpec(
    name="embed",
    version=1,
    options=EmbedOptions,
    inputs={"chunks": Slot(tuple(_COLUMNS))},
    plan=plan,
    shard=shard,
    about="One unit vector a passage, chat or text.",
)
