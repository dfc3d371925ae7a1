"""The manifest: what a table consists of and how it came about. Nothing it does not list exists."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

import pyarrow as pa

from ..errors import StoreError
from . import schemas
from .ids import canonical_json, digest

FORMAT = 1

Kind = Literal["table", "index", "report"]


class Part(TypedDict):
    """One Parquet file of a table. `path` is relative to the table's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str
    logical_digest: str  # 32 hexadecimal digits, see rowhash: parts fold to the table's digest
    shard: int
    footer: int  # where the Parquet footer begins
    checksums: str  # CRC-32 of the footer and of every column chunk, see parquet.Checksums


class Attachment(TypedDict):
    """One file beside the rows: a FAISS index, a report."""

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that a store knows of one table; attributes are the JSON keys.

    Attributes:
        name: the name given when it was written (names may move on, this does not).
        kind: `table`, `index` or `report`.
        step, version, options, parents, models, seed: what the key is the digest of.
            `parents` are the keys of the inputs in their order, `models` name -> digest.
        rows, logical_digest: of all parts together; see `rowhash`.
        kept, dropped: counts of what the step decided, `dropped` by reason. Where a step
            counted nothing itself, `kept` is the number of rows.
        rejected: rows that could not be processed; they stand in `rejects`.
        libraries: versions of what was loaded when the table was committed.
        seconds: from opening the writer that committed to the commit, wall clock.
        shard_seconds: sum over shards, whichever process and attempt did them.
        peak_memory_bytes: largest resident size of any process that wrote a shard (its peak
            over its whole life, as the kernel reports it).
        created: UTC, ISO 8601.
        prunery: version of this package.
        notes: whatever else the step wants on record (not covered by the key).
        arrow_schema: the schema exactly, Arrow IPC in base64; `schema` is for people.
    """

    name: str
    kind: str
    step: str
    version: int
    key: str
    options: dict[str, Any]
    parents: list[str]
    models: dict[str, str]
    seed: int
    schema: list[dict[str, Any]]
    arrow_schema: str
    parts: list[Part]
    rejects: list[Part]
    attachments: list[Attachment]
    rows: int
    logical_digest: str
    kept: int
    dropped: dict[str, int]
    rejected: int
    libraries: dict[str, str]
    seconds: float
    shard_seconds: float
    peak_memory_bytes: int
    created: str
    prunery: str
    notes: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, without the manifest's own digest."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def to_bytes(self) -> bytes:
        """Write as JSON with `manifest_sha256`, the digest of all the rest."""
        body = self.to_dict()
        # once through JSON, so that the digest is of what a reader will see
        body = json.loads(canonical_json(body))
        body["manifest_sha256"] = digest(body)
        return json.dumps(body, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Read a manifest and check it against its own digest.

        Raises:
            StoreError: not JSON, altered, written by a later format, or keys missing.
        """
        body = _parse(data, where)
        found = body.pop("manifest_sha256", None)
        if body.get("format") != FORMAT:
            raise StoreError(
                f"{where}: expected manifest format {FORMAT}, found {body.get('format')!r}; "
                "read it with the version of prunery that wrote it "
                f"({body.get('prunery', 'unknown')})"
            )
        if found != (expected := digest(body)):
            raise StoreError(
                f"{where}: expected a manifest with digest {expected}, found {found}; the file "
                "was altered after it was written: remove the table and run its step again"
            )
        names = {item.name for item in fields(cls)}
        if set(body) != names:
            raise StoreError(
                f"{where}: expected the keys of a manifest, found missing "
                f"{sorted(names - set(body))} and unknown {sorted(set(body) - names)}"
            )
        return cls(**body)

    def pa_schema(self) -> pa.Schema:
        """Return the Arrow schema of the rows."""
        return schemas.from_text(self.arrow_schema)

    def files(self) -> list[Part | Attachment]:
        """Return every file that the manifest lists."""
        return [*self.parts, *self.rejects, *self.attachments]

    @property
    def bytes(self) -> int:
        """Stored bytes of all listed files."""
        return sum(item["bytes"] for item in self.files())


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError as error:
        raise StoreError(
            f"{where}: expected JSON, found something else ({error}); the file is damaged: "
            "remove the table and run its step again"
        ) from error
    if not isinstance(body, dict):
        raise StoreError(f"{where}: expected a JSON object, found {type(body).__name__}")
    return body


def key_of(
    *,
    step: str,
    version: int,
    options: Mapping[str, Any],
    inputs: list[str],
    models: Mapping[str, str],
    seed: int,
) -> str:
    """Return the content key of a table, 64 hexadecimal digits: the digest of all that made it."""
    return digest(
        {
            "step": step,
            "version": version,
            "options": options,
            "inputs": inputs,
            "models": models,
            "seed": seed,
        }
    )
