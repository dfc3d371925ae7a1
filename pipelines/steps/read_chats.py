"""Step `read_chats`: rows of any chat format to one table, each row as it was beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from ...storage import Table
from .. import chats, sources
from ..engine import Job, Plan, Rows, StepContext, StepOptions, StepSpec
from ..sft_tables import CHATS

_ROWS_A_BATCH = 1024


class ReadChatsOptions(StepOptions):
    """Options of `read_chats`.

    Attributes
    ----------
    path
        A file, a folder (read recursively, names starting with a dot left out), a glob pattern,
        or a list of those; `builtin:python-chats` is made of Python's own docstrings.
    format
        messages, sharegpt, prompt_completion, alpaca or text (see `pipelines.chats`); by the
        keys of a file's first rows where not given.
    domain_field
        Key of the row that names its domain, dotted where nested; without it every row has the
        domain "". The built-in chats have their module for a domain.
    shard_bytes
        About so many bytes of sources make a shard. The rows are the same for any value, so it
        does not enter the key.
    """

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | list[str]
    format: chats.ChatFormat | None = None
    domain_field: str | None = None
    shard_bytes: int = Field(default=sources.PIECE_BYTES, ge=1)


def plan(options: ReadChatsOptions, inputs: Mapping[str, Table], context: StepContext) -> Plan:
    """Scan the files and tell their formats; one shard for each `shard_bytes` or so."""
    paths = [options.path] if isinstance(options.path, str) else options.path
    found = chats.scan_chats(paths, format=options.format, piece_bytes=options.shard_bytes)
    identity = {
        "format": options.format,
        "domain_field": options.domain_field,
        "source_digest": found.digest,
    }
    groups = sources.group_pieces(found.pieces, options.shard_bytes)
    notes = {
        "path": paths,
        "formats": found.formats,
        "files_of_other_kinds": list(found.skipped),
    }
    return Plan(CHATS, len(groups), identity, payload=groups, notes=notes)


def shard(job: Job, index: int, out: Rows) -> None:
    """Check and write the rows of one group of pieces."""
    options: ReadChatsOptions = job.options  # type: ignore[assignment]
    made: list[dict[str, Any]] = []
    kept = 0
    for found in job.plan.payload[index]:
        for row in chats.read_chats(found, out.reject, domain_field=options.domain_field):
            made.append(row)
            kept += 1
            if len(made) >= _ROWS_A_BATCH:
                out.write(pa.Table.from_pylist(made, CHATS))
                made.clear()
    if made:
        out.write(pa.Table.from_pylist(made, CHATS))
    out.count(kept, {})


SPEC = StepSpec(
    name="read_chats",
    version=1,
    options=ReadChatsOptions,
    inputs={},
    plan=plan,
    shard=shard,
    about="Rows of any chat format to one table of messages.",
)
