"""Step `chunk`: files to passages of whole sentences, with their place in the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from ...storage import Table, row_id
from .. import chunking, sources
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec
from ..models import encoder

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        # Ends of its sentences in `text`; the last is its length.
        pa.field("sentence_ends", pa.list_(pa.int32()), nullable=False),
    ]
)
_ROWS_A_BATCH = 4096


class ChunkOptions(StepOptions):
    """Options of `chunk`.

    Attributes
    ----------
    path
        A file, a folder (read recursively, names starting with a dot left out), a glob pattern,
        or a list of those; `builtin:python-docs` is the documentation in `pydoc_data.topics`.
    format
        text, markdown, html, jsonl or parquet; by the file's ending where not given.
    text_field, title_field
        Fields of JSONL rows and Parquet columns; the title may be absent.
    tokenizer
        Model whose tokens are counted; a chunk should fit the window of the encoder.
    max_tokens
        Longest chunk, in those tokens, without title and special tokens.
    overlap
        Sentences repeated from the chunk before, within a section.
    shard_bytes
        About so many bytes of sources make a shard, the unit of work that is redone after a
        failure. The rows are the same for any value, so it does not enter the key.
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | list[str]
    format: sources.Format | None = None
    text_field: str = "text"
    title_field: str = "title"
    tokenizer: str = "all-MiniLM-L6-v2"
    max_tokens: int = Field(default=160, ge=8, le=100_000)
    overlap: int = Field(default=0, ge=0, le=100)
    shard_bytes: int = Field(default=sources.PIECE_BYTES, ge=1)


def plan(options: ChunkOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """Scan the files; one shard for each `shard_bytes` or so."""
    paths = [options.path] if isinstance(options.path, str) else options.path
    found = sources.scan(paths, format=options.format, piece_bytes=options.shard_bytes)
    resolved = encoder(options.tokenizer)
    identity = options.model_dump(exclude={"path", "format", "shard_bytes"}) | {
        "source_digest": found.digest
    }
    groups = sources.group_pieces(found.pieces, options.shard_bytes)
    return Plan(
        SCHEMA,
        len(groups),
        identity,
        {"tokenizer": resolved.sha256},
        payload=groups,
        notes={"path": paths, "files": found.files, "files_of_other_kinds": list(found.skipped)},
    )


def shard(job: Job, index: int, out: Rows) -> None:
    """Chunk the documents of one group of pieces.

    Text that stands twice in a source at the same place cannot be; chunks of equal text in
    different places are all kept here, and told apart by `prune_passages` if wanted.
    """
    options: ChunkOptions = job.options  # type: ignore[assignment]
    counter = chunking.token_counter(str(encoder(options.tokenizer).path))
    made: list[dict[str, Any]] = []
    kept = empty = 0
    for piece in job.plan.payload[index]:
        documents = sources.read_piece(
            piece, out.reject, text_field=options.text_field, title_field=options.title_field
        )
        for document in documents:
            chunks = chunking.chunk_document(
                document, counter, max_tokens=options.max_tokens, overlap=options.overlap
            )
            empty += not chunks
            kept += len(chunks)
            made.extend(_row(document, chunk) for chunk in chunks)
            if len(made) >= _ROWS_A_BATCH:
                out.write(pa.Table.from_pylist(made, SCHEMA))
                made.clear()
    if made:
        out.write(pa.Table.from_pylist(made, SCHEMA))
    out.count(kept, {"empty document": empty} if empty else {})


def _row(document: sources.Document, chunk: chunking.Chunk) -> dict[str, Any]:
    start, end = document.span(chunk.start, chunk.end)
    text = document.text[chunk.start : chunk.end]
    return {
        "id": row_id(document.source, start, end, text),
        "source": document.source,
        "start": start,
        "end": end,
        "title": chunk.title,
        "text": text,
        "tokens": chunk.tokens,
        "sentence_ends": list(chunk.sentence_ends),
    }


SPEC = StepSpec(
    name="chunk",
    version=1,
    options=ChunkOptions,
    inputs={},
    plan=plan,
    shard=shard,
    about="Files to passages of whole sentences, with their place in the source.",
)
