"""Where documents come from: files of five kinds, and the documentation that Python ships with.

`scan` looks at the files once: it takes their digest, which enters the key of the table, and
cuts them into pieces that can be read alone, so that shards can be made in any order by any
process. `read_piece` gives the documents of one piece.
"""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from ..errors import InputError
from .html_text import html_text

Format = Literal["text", "markdown", "html", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("text", "markdown", "html", "jsonl", "parquet")
_SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
RowFormat = Literal["jsonl", "json", "parquet"]
ROW_SUFFIXES: dict[str, RowFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
"""Endings of files that hold rows; `scan(suffixes=ROW_SUFFIXES)` looks for these alone."""
BUILTIN_DOCS = "builtin:python-docs"
PIECE_BYTES = 8 << 20
"""A JSONL or Parquet file larger than this is read in several pieces."""

# (row, reason, where) of a row that cannot be used.
Reject = Callable[[Mapping[str, Any], str, str], None]


class RowProblem(Exception):
    """A row that cannot be used: the key or column that is wrong, and why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


def shown(value: Any) -> str:
    """Type and first characters of a value, for a message."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it stands.

    Attributes
    ----------
    source
        Name of the file relative to what was asked for, with `#row` (from 1) in row formats.
    text
        What is chunked.
    title
        Given by a row's title field or a page's title element, or "".
    format
        Decides how headings are found.
    offsets
        For each character of `text`, its character offset in the source; None: the same plus
        `base`.
    headings
        (start, end, level) in `text`, for formats that mark them outside the text.
    """

    source: str
    text: str
    title: str
    format: Format | RowFormat
    base: int = 0
    offsets: array[int] | None = None
    headings: tuple[tuple[int, int, int], ...] = ()

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Offsets in the source of `text[start:end]`, end exclusive."""
        if self.offsets is None:
            return self.base + start, self.base + end
        if start == end:
            at = self.offsets[start] if start < len(self.offsets) else 0
            return at, at
        return self.offsets[start], self.offsets[end - 1] + 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that can be read alone: bytes of JSONL, row groups of Parquet.

    A JSON array ("json") is always one piece.
    """

    path: str
    name: str
    format: Format | RowFormat
    size: int
    start: int = 0
    stop: int = -1
    first_row: int = 1


@dataclass(frozen=True, slots=True)
class Scan:
    """What `scan` found: the pieces in order, a digest of names and contents, files left out."""

    pieces: tuple[Piece, ...]
    digest: str
    files: int
    skipped: tuple[str, ...] = field(default=())


def scan(
    paths: Sequence[str],
    *,
    format: Format | None = None,
    piece_bytes: int = PIECE_BYTES,
    suffixes: Mapping[str, Format | RowFormat] = _SUFFIXES,
) -> Scan:
    """Look at files, folders (recursively) and glob patterns; hash what they hold.

    JSONL and Parquet files beyond `piece_bytes` become several pieces. `suffixes` are the
    endings that are read; files of a folder with another ending are skipped.

    Raises
    ------
    InputError
        A path matches nothing, or a file's kind is unknown and `format` does not say it.
    """
    pieces: list[Piece] = []
    skipped: list[str] = []
    whole = hashlib.sha256()
    files = 0
    for path in paths:
        if path == BUILTIN_DOCS:
            pieces.extend(_builtin_pieces(whole))
            files += 1
            continue
        for file, name, explicit in expand(path):
            kind = format or suffixes.get(file.suffix.lower())
            if kind is None:
                if explicit:
                    advice = f"Set `format` to one of {', '.join(FORMATS)}."
                    raise InputError(
                        f"cannot tell the format of {file}: known endings are"
                        f" {', '.join(suffixes)}."
                        f" {advice if suffixes is _SUFFIXES else 'Rename or convert it.'}"
                    )
                skipped.append(name)
                continue
            made, digest = pieces_of(file, name, kind, piece_bytes)
            whole.update(f"{len(name)}:{name}:{kind}:{digest};".encode())
            pieces.extend(made)
            files += 1
    if not pieces and not files:
        raise InputError(
            f"found no readable file in {', '.join(paths)} ({len(skipped)} of other kinds)."
            f" Readable endings are {', '.join(suffixes)}."
        )
    return Scan(tuple(pieces), whole.hexdigest(), files, tuple(skipped))


class Sized(Protocol):
    """What has a size in bytes."""

    @property
    def size(self) -> int: ...


SizedT = TypeVar("SizedT", bound=Sized)


def group_pieces(pieces: Sequence[SizedT], limit: int = PIECE_BYTES) -> list[list[SizedT]]:
    """Put neighbouring pieces together until a group holds `limit` bytes: one shard each."""
    groups: list[list[SizedT]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups


def read_piece(
    piece: Piece, reject: Reject, *, text_field: str = "text", title_field: str = "title"
) -> Iterator[Document]:
    """The documents of a piece, in order. Bad files and rows go to `reject`.

    Raises
    ------
    InputError
        A Parquet file lacks the text column, or a file changed since it was scanned.
    """
    if piece.path == BUILTIN_DOCS:
        yield Document(piece.name, _builtin_topics()[piece.name], "", "text")
    elif piece.format == "jsonl":
        yield from _jsonl(piece, reject, text_field, title_field)
    elif piece.format == "parquet":
        yield from _parquet(piece, reject, text_field, title_field)
    else:
        yield from _file(piece, reject)


def expand(path: str) -> Iterator[tuple[Path, str, bool]]:
    """(file, name to show, whether it was named outright) of a file, folder or pattern, sorted.

    Raises InputError where nothing matches.
    """
    root = Path(path)
    if root.is_file():
        yield root, root.name, True
    elif root.is_dir():
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            relative = file.relative_to(root)
            if not any(part.startswith(".") for part in relative.parts):
                yield file, relative.as_posix(), False
    elif glob.has_magic(path):
        found = sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file())
        if not found:
            raise InputError(f"the pattern {path} matches no file.")
        fixed = Path(*_fixed_parts(root))
        for file in found:
            yield file, file.relative_to(fixed).as_posix(), False
    else:
        raise InputError(
            f"no such file or folder: {path}. Give a file, a folder, a glob pattern, or the name"
            " of something built in (builtin:…)."
        )


def name_apart(name: str, path: str, names: dict[str, str]) -> str:
    """The name, or `name (2)` where another path has it; `names` is name to path, and grows."""
    made, count = name, 1
    while names.setdefault(made, path) != path:
        count += 1
        made = f"{name} ({count})"
    return made


def _fixed_parts(pattern: Path) -> list[str]:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def pieces_of(
    file: Path, name: str, kind: Format | RowFormat, piece_bytes: int = PIECE_BYTES
) -> tuple[list[Piece], str]:
    """The pieces of one file, and its SHA-256."""
    size = file.stat().st_size
    if kind == "jsonl" or (kind == "json" and not _starts_an_array(file)):
        return _jsonl_pieces(file, name, piece_bytes)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if kind == "parquet":
        return _parquet_pieces(file, name, piece_bytes), digest
    return [Piece(str(file), name, kind, size)], digest


def _starts_an_array(file: Path) -> bool:
    """Whether a `.json` file holds one array; many hold an object a line instead."""
    with file.open("rb") as stream:
        while block := stream.read(4096):
            if start := block.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]:
                return start == b"["
    return False


def _jsonl_pieces(file: Path, name: str, piece_bytes: int) -> tuple[list[Piece], str]:
    """Cut at line ends, hashing and counting lines on the way: one pass, one block in memory."""
    digest = hashlib.sha256()
    pieces: list[Piece] = []
    start = position = 0
    first_row = row = 1
    with file.open("rb") as stream:
        for line in stream:
            digest.update(line)
            position += len(line)
            row += 1
            if position - start >= piece_bytes:
                pieces.append(
                    Piece(str(file), name, "jsonl", position - start, start, position, first_row)
                )
                start, first_row = position, row
    if position > start:
        size = position - start
        pieces.append(Piece(str(file), name, "jsonl", size, start, position, first_row))
    return pieces, digest.hexdigest()


def _parquet_pieces(file: Path, name: str, piece_bytes: int) -> list[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {error}") from error
    pieces: list[Piece] = []
    start = size = 0
    first_row = row = 1
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(str(file), name, "parquet", size, start, group + 1, first_row))
            start, size, first_row = group + 1, 0, row
    return pieces


def _jsonl(piece: Piece, reject: Reject, text_field: str, title_field: str) -> Iterator[Document]:
    for row, line in read_lines(piece):
        where = f"{piece.name}, row {row}"
        record = parse_object(line, where, reject)
        if record is None:
            continue
        yield from _record(record, piece, row, where, reject, text_field, title_field)


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, line without its end) of a JSONL piece; blank lines are passed over."""
    with open(piece.path, "rb") as stream:
        stream.seek(piece.start)
        row, position = piece.first_row, piece.start
        while position < piece.stop:
            line = stream.readline()
            if not line:
                raise InputError(
                    f"{piece.path} changed while it was read: it ended at byte {position}, and"
                    f" {piece.stop} were there before. Run again."
                )
            position += len(line)
            if line.strip():
                yield row, line.rstrip(b"\r\n")
            row += 1


def parse_object(line: bytes, where: str, reject: Reject) -> dict[str, Any] | None:
    """One JSON object, or None after telling `reject` why not."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        shown = line[:500].decode("utf-8", "replace")
        reject({"line": shown}, f"not a line of JSON: {error}.", where)
        return None
    if not isinstance(record, dict):
        reject(
            {"line": line[:500].decode("utf-8", "replace")},
            f"expected a JSON object; found {type(record).__name__}.",
            where,
        )
        return None
    return record


def read_rows(piece: Piece, reject: Reject) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(row number from 1, row, its JSON text as read) of a piece of rows; bad ones to `reject`.

    The text is the line itself for JSONL, and the row written as JSON for the other kinds.

    Raises
    ------
    InputError
        A `.json` file is not one array of JSON, or a file changed since it was scanned.
    """
    if piece.format == "jsonl":
        for row, line in read_lines(piece):
            record = parse_object(line, f"{piece.name}, row {row}", reject)
            if record is not None:
                yield row, record, line.decode("utf-8")
        return
    records = _array(piece) if piece.format == "json" else _parquet_rows(piece)
    for row, record in enumerate(records, piece.first_row):
        if isinstance(record, dict):
            yield row, record, json_text(record)
        else:
            reject(
                {"value": str(record)[:500]},
                f"expected a JSON object; found {type(record).__name__}.",
                f"{piece.name}, row {row}",
            )


def json_text(value: Any) -> str:
    """JSON that a UTF-8 column can hold: half of a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def _array(piece: Piece) -> list[Any]:
    try:
        found = json.loads(Path(piece.path).read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{piece.path}: expected one JSON array of objects; found damaged JSON ({error})."
            " Mend the file, or write one object a line with the ending .jsonl."
        ) from error
    return list(found)


def _parquet_rows(piece: Piece) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(piece.path) as file:
        for batch in file.iter_batches(1024, row_groups=list(range(piece.start, piece.stop))):
            yield from batch.to_pylist()


def _record(
    record: Mapping[str, Any],
    piece: Piece,
    row: int,
    where: str,
    reject: Reject,
    text_field: str,
    title_field: str,
) -> Iterator[Document]:
    text, title = record.get(text_field), record.get(title_field)
    for name, value, needed in ((text_field, text, True), (title_field, title, False)):
        problem = _text_problem(value, needed, sorted(record))
        if problem:
            reject(dict(record), problem, f"{where}, column {name}")
            return
    yield Document(f"{piece.name}#{row}", text or "", title or "", "text")


def _text_problem(value: Any, needed: bool, fields: list[str]) -> str:
    if value is None:
        return f"expected text; the row has only {', '.join(fields) or 'no fields'}." * needed
    if not isinstance(value, str):
        return f"expected text; found {type(value).__name__} {str(value)[:80]!r}."
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"the text holds half of a surrogate pair at character {error.start}."
    return ""


def _parquet(piece: Piece, reject: Reject, text_field: str, title_field: str) -> Iterator[Document]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(piece.path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise InputError(
                f"{piece.path} has no column `{text_field}`; it has {', '.join(names)}. Set"
                " `text_field`."
            )
        columns = [name for name in (text_field, title_field) if name in names]
        row = piece.first_row
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(1024, row_groups=groups, columns=columns):
            for record in batch.to_pylist():
                where = f"{piece.name}, row {row}"
                yield from _record(record, piece, row, where, reject, text_field, title_field)
                row += 1


def _file(piece: Piece, reject: Reject) -> Iterator[Document]:
    data = Path(piece.path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        reject(
            {"file": piece.name},
            f"not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}.",
            piece.name,
        )
        return
    if piece.format == "html":
        page = html_text(text)
        yield Document(
            piece.name,
            page.text,
            page.title,
            "html",
            offsets=page.offsets,
            headings=tuple(page.headings),
        )
        return
    base = 1 if text.startswith("\ufeff") else 0
    yield Document(piece.name, text[base:], "", piece.format, base=base)


def _builtin_topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics

    return topics


def _builtin_pieces(whole: Any) -> list[Piece]:
    pieces = []
    for name, text in sorted(_builtin_topics().items()):
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole.update(f"{len(name)}:{name}:builtin:{digest};".encode())
        pieces.append(Piece(BUILTIN_DOCS, name, "text", len(text)))
    return pieces
