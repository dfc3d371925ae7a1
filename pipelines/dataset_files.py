"""Files of labelled data sets: what each is, where it can be cut, and the raw rows of a piece.

Kinds, told apart by content, and by the ending only where text looks like any other text:

image     PNG, JPEG or whatever else Pillow reads; the folder that it stands in is its class
array     IDX pairs as MNIST has them, plain or gzipped (`…-images-idx3-ubyte` and
          `…-labels-idx1-ubyte`), and .npz with x and y, or x_train, y_train, x_test, y_test
parquet, jsonl, json, csv (.tsv with tabs)     rows with a column for the label; names of
          classes that Hugging Face's `datasets` wrote into a Parquet schema are used

Every raw row is a mapping with the caller's own column names, whatever file it comes from. Rows
are read one batch after another, but for a `.json` file that is one array: it is read whole.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..storage import file_digest
from . import builtin_datasets, builtin_texts, sources
from .sources import PIECE_BYTES, RowProblem

FileKind = Literal["image", "array", "builtin", "texts", "csv", "jsonl", "json", "parquet"]
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "t10k": "test",
    "validation": "test",
    "valid": "test",
    "val": "test",
    "dev": "test",
}
"""Words for a split, and the split: whatever is held out is `test`."""

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# What a folder is read as where it holds several: a picture's notes are no data set.
_FAMILIES: tuple[tuple[FileKind, ...], ...] = (
    ("image",),
    ("array",),
    ("parquet", "jsonl", "json", "csv"),
)
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_NPZ_PAIRS = (("x", "y"), ("x_train", "y_train"), ("x_test", "y_test"))
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class ArrayPart:
    """An array inside a file, whose rows are read one after another.

    `member` names it inside an .npz and is "" for IDX; its values start `offset` bytes into
    the stream.
    """

    path: str
    member: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])

    def rows(self, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        """The rows [start, stop), `_ROWS_AT_ONCE` in memory at a time."""
        with _opened(self.path, self.member) as stream:
            # Compressed streams go forward by reading what is passed over.
            stream.seek(self.offset + start * self.row_bytes)
            for at in range(start, stop, _ROWS_AT_ONCE):
                count = min(_ROWS_AT_ONCE, stop - at)
                data = stream.read(count * self.row_bytes)
                if len(data) != count * self.row_bytes:
                    raise InputError(
                        f"{self.path}: expected {self.shape[0]} rows of {self.row_bytes} bytes,"
                        f" found the end of the file after row {at + len(data) // self.row_bytes}."
                        " Fetch the file again."
                    )
                yield from np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class DataPiece:
    """A part of a data set that can be read alone.

    `start` and `stop` are bytes of JSONL and CSV, row groups of Parquet, rows of arrays.
    `split` is train, test, or "" where neither the path nor a name says it.
    """

    path: str
    name: str
    kind: FileKind
    size: int
    start: int = 0
    stop: int = -1
    first_row: int = 1
    split: str = ""
    arrays: tuple[ArrayPart, ArrayPart] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What `scan_files` found at a path."""

    pieces: tuple[DataPiece, ...]
    digest: str
    skipped: tuple[str, ...]


def scan_files(path: str, names: dict[str, str], *, piece_bytes: int = PIECE_BYTES) -> Found:
    """Look at a file, folder, pattern or built-in set; hash what it holds and cut it up.

    A folder with images is read as images, else one with arrays as arrays, else its rows; the
    other files are `skipped`. `names` keeps files of one name apart, see `sources.name_apart`.

    Raises
    ------
    InputError
        Nothing matches, a file is of no known kind, or an array is not of a shape known.
    """
    if path in builtin_datasets.NAMES:
        rows = len(builtin_datasets.digits()[1])
        piece = DataPiece(path, path, "builtin", rows * 64, stop=rows)
        return Found((piece,), f"{path}:{builtin_datasets.digest()}", ())
    if path == builtin_texts.NAME:
        texts = builtin_texts.docstrings()
        size = sum(len(text) for text, _ in texts)
        piece = DataPiece(path, path, "texts", size, stop=len(texts))
        return Found((piece,), f"{path}:{builtin_texts.digest()}", ())
    files = [(file, name, file_kind(file)) for file, name, _ in sources.expand(path)]
    family = next((one for one in _FAMILIES if any(kind in one for *_, kind in files)), ())
    skipped = [name for _, name, kind in files if kind not in family]
    if not family:
        raise InputError(
            f"found no file of a labelled data set in {path}"
            f" ({', '.join(skipped[:5]) or 'no file at all'}). Known are images in folders of"
            " their class, IDX pairs and .npz, and rows in .parquet, .jsonl, .json, .csv and .tsv."
        )
    whole = hashlib.sha256()
    pieces: list[DataPiece] = []
    for file, name, kind in files:
        if kind is None or kind not in family:
            continue
        made, digest = _pieces_of(
            file, sources.name_apart(name, str(file), names), kind, piece_bytes
        )
        whole.update(f"{len(name)}:{name}:{kind}:{digest};".encode())
        pieces += made
    return Found(tuple(_placed(pieces)), whole.hexdigest(), tuple(skipped))


def file_kind(file: Path) -> FileKind | None:
    """What a file is, or None."""
    with file.open("rb") as stream:
        head = stream.read(16)
    suffix = file.suffix.lower()
    if head.startswith(_MAGIC) or suffix in _IMAGES:
        return "image"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"PK\x03\x04") and suffix == ".npz":
        return "array"
    if head.startswith(b"\x1f\x8b"):
        with _opened(str(file), "") as stream:
            head = stream.read(4)
    if len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _IDX_TYPES and 0 < head[3] < 5:
        return "array"
    return "csv" if suffix in _DELIMITERS else sources.ROW_SUFFIXES.get(suffix)


def _placed(pieces: Sequence[DataPiece]) -> Iterator[DataPiece]:
    """The pieces with the split that their names say, where they say both splits, of all."""
    words = [_split_word(piece) for piece in pieces]
    clear = {"train", "test"} == set(words)
    for piece, word in zip(pieces, words, strict=True):
        yield replace(piece, split=word) if clear else piece


def _split_word(piece: DataPiece) -> str:
    parts = piece.name.lower().split("/")
    if piece.kind == "image":
        return SPLITS.get(parts[0], "") if len(parts) > 2 else ""
    found = re.match(r"(?:[xy]_)?([a-z0-9]+)", parts[-1])
    words = [found[1] if found else "", *reversed(parts[:-1])]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _pieces_of(
    file: Path, name: str, kind: FileKind, piece_bytes: int
) -> tuple[list[DataPiece], str]:
    if kind == "image":
        return [DataPiece(str(file), name, kind, file.stat().st_size)], file_digest(file)
    if kind == "array":
        return _array_pieces(file, name, piece_bytes)
    if kind == "csv":
        return _csv_pieces(file, name, piece_bytes)
    made, digest = sources.pieces_of(file, name, cast(sources.RowFormat, kind), piece_bytes)
    pieces = [
        DataPiece(
            piece.path,
            piece.name,
            cast(FileKind, piece.format),
            piece.size,
            piece.start,
            piece.stop,
            piece.first_row,
        )
        for piece in made
    ]
    return pieces, digest


# -- arrays --------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, member: str) -> Iterator[IO[bytes]]:
    """The bytes of a plain or gzipped file, or of a member of an .npz."""
    try:
        if member:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                yield stream
        else:
            with open(path, "rb") as raw:
                zipped = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw) if zipped else raw)
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: expected whole compressed data, found {error}. Fetch the file again."
        ) from error


def _array_pieces(file: Path, name: str, piece_bytes: int) -> tuple[list[DataPiece], str]:
    if file.suffix.lower() == ".npz":
        pairs, digest = _npz_pairs(file, name), file_digest(file)
    else:
        pairs, digest = _idx_pair(file, name)
    pieces = []
    for shown, x, y in pairs:
        _check_pair(shown, x, y)
        step = max(1, piece_bytes // max(1, x.row_bytes))
        for start in range(0, x.shape[0], step):
            stop = min(start + step, x.shape[0])
            size = (stop - start) * x.row_bytes
            piece = DataPiece(str(file), shown, "array", size, start, stop, start + 1, "", (x, y))
            pieces.append(piece)
    return pieces, digest


def _idx_pair(file: Path, name: str) -> tuple[list[tuple[str, ArrayPart, ArrayPart]], str]:
    """The images with the labels beside them; nothing for a file of labels."""
    x = _idx(file)
    if len(x.shape) == 1:
        return [], ""
    stem = file.name.removesuffix(".gz")
    wanted = stem.replace("images", "labels").replace(f"idx{len(x.shape)}", "idx1")
    beside = [file.with_name(wanted), file.with_name(f"{wanted}.gz")]
    found = next((path for path in beside if path.is_file() and wanted != stem), None)
    if found is None:
        raise InputError(
            f"{file}: expected its labels beside it as {wanted} (or .gz), found no such file."
        )
    return [(name, x, _idx(found))], f"{file_digest(file)}:{file_digest(found)}"


def _idx(file: Path) -> ArrayPart:
    with _opened(str(file), "") as stream:
        head = stream.read(4)
        sizes = np.frombuffer(stream.read(4 * head[3]), ">u4")
    dtype = _IDX_TYPES.get(head[2], "")
    if not dtype or len(sizes) != head[3]:
        raise InputError(f"{file}: expected the header of an IDX file, found {head!r}.")
    shape = tuple(int(size) for size in sizes)
    return ArrayPart(str(file), "", dtype, shape, 4 + 4 * len(shape))


def _npz_pairs(file: Path, name: str) -> list[tuple[str, ArrayPart, ArrayPart]]:
    with zipfile.ZipFile(file) as archive:
        members = {Path(one).stem.lower(): one for one in archive.namelist() if one[-4:] == ".npy"}
    pairs = [(x, y) for x, y in _NPZ_PAIRS if x in members and y in members]
    if not pairs:
        raise InputError(
            f"{file}: expected arrays named x and y (or x_train, y_train, x_test, y_test); found"
            f" {', '.join(sorted(members)) or 'none'}. Save it with np.savez(file, x=…, y=…)."
        )
    made = []
    for x, y in pairs:
        shown = name if (x, y) == _NPZ_PAIRS[0] else f"{name}/{x}"
        made.append((shown, _npy(file, members[x]), _npy(file, members[y])))
    return made


def _npy(file: Path, member: str) -> ArrayPart:
    with _opened(str(file), member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{file}, array {member}: expected a .npy header, found {error}."
            ) from error
        offset = stream.tell()
    if dtype.kind not in "biufU" or (fortran and len(shape) > 1):
        raise InputError(
            f"{file}, array {member}: expected numbers or text row after row, found {dtype}"
            f"{' in Fortran order' if fortran else ''}. Save np.ascontiguousarray of plain values."
        )
    return ArrayPart(str(file), member, dtype.str, shape, offset)


def _check_pair(name: str, x: ArrayPart, y: ArrayPart) -> None:
    if not x.shape or not y.shape or x.shape[0] != y.shape[0] or math.prod(y.shape[1:]) != 1:
        raise InputError(
            f"{name}: expected one label for each row, found values of shape {x.shape} and labels"
            f" of shape {y.shape}."
        )
    array_kind(name, x)


def array_kind(name: str, x: ArrayPart) -> Literal["image", "text", "features"]:
    """What the rows of an array are, by its shape and type.

    Raises InputError for shapes that are none of (N, d) numbers, (N,) text, and uint8 images
    (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3.
    """
    kind, ndim = np.dtype(x.dtype).kind, len(x.shape)
    if ndim == 2 and kind in "biuf":
        return "features"
    if ndim == 1 and kind == "U":
        return "text"
    channels = {x.shape[1], x.shape[3]} & {1, 3} if ndim == 4 else {1}
    if np.dtype(x.dtype) == np.uint8 and ndim in (3, 4) and channels:
        return "image"
    raise InputError(
        f"{name}: expected (N, d) numbers, (N,) text, or uint8 images (N, H, W), (N, H, W, C) or"
        f" (N, C, H, W) with C 1 or 3; found shape {x.shape} of {x.dtype}. Reshape and save again."
    )


def _pixels(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A row of an image array as (H, W) or (H, W, 3)."""
    if row.ndim == 3 and row.shape[2] not in (1, 3):
        row = np.moveaxis(row, 0, 2)
    return np.ascontiguousarray(row[:, :, 0] if row.ndim == 3 and row.shape[2] == 1 else row)


# -- rows of text --------------------------------------------------------------------------------


def _csv_pieces(file: Path, name: str, piece_bytes: int) -> tuple[list[DataPiece], str]:
    """Cut between records (a quoted field may hold line ends), hashing on the way."""
    digest = hashlib.sha256()
    borders: list[tuple[int, int]] = []  # (byte, row) where a piece starts
    with file.open("rb") as stream:
        lines = _Lines(stream, digest)
        for row, _ in enumerate(_csv_records(file, lines)):
            if row == 0 or lines.position - borders[-1][0] >= piece_bytes:
                borders.append((lines.position, row + 1))
    if borders and borders[-1][0] != lines.position:
        borders.append((lines.position, 0))
    pieces = [
        DataPiece(str(file), name, "csv", stop - start, start, stop, row)
        for (start, row), (stop, _) in pairwise(borders)
    ]
    return pieces, digest.hexdigest()


class _Lines:
    """Lines of a file as text, and the byte after the last one given."""

    def __init__(self, stream: IO[bytes], digest: Any = None, stop: int = -1) -> None:
        self.position = stream.tell()
        self._stream = stream
        self._digest = digest
        self._stop = stop

    def __iter__(self) -> Iterator[str]:
        for line in iter(self._stream.readline, b""):
            self.position += len(line)
            if self._digest is not None:
                self._digest.update(line)
            # Bytes that are no UTF-8 become half surrogates, which the row is refused for.
            yield line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
            if 0 <= self._stop <= self.position:
                return


def _csv_records(file: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    """The records, header first where the lines begin with it; blank lines are left out."""
    reader = csv.reader(lines, delimiter=_DELIMITERS[file.suffix.lower()])
    try:
        yield from filter(None, reader)
    except csv.Error as error:
        raise InputError(
            f"{file}, line {reader.line_num}: expected CSV, found {error}. Mend it, or write JSON"
            " lines."
        ) from error


def _csv(piece: DataPiece, reject: sources.Reject) -> Iterator[tuple[int, dict[str, Any]]]:
    file = Path(piece.path)
    with file.open("rb") as stream:
        header = next(_csv_records(file, _Lines(stream)), [])
        if len(set(header)) != len(header):
            raise InputError(f"{file}: expected every column once in the header, found {header}.")
        stream.seek(piece.start)
        records = _csv_records(file, _Lines(stream, stop=piece.stop))
        for row, record in enumerate(records, piece.first_row):
            if len(record) == len(header):
                yield row, dict(zip(header, record, strict=True))
                continue
            reject(
                {"record": record[:20]},
                f"expected {len(header)} fields as the header has, found {len(record)}.",
                f"{piece.name}, row {row}",
            )


def _parquet(
    piece: DataPiece, label: str, wanted: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the wanted columns alone; lists of numbers stay arrays, class codes get names."""
    import pyarrow.parquet as pq

    tops = {name.partition(".")[0] for name in wanted} | set(wanted)
    with pq.ParquetFile(piece.path) as file:
        columns = [name for name in file.schema_arrow.names if name in tops]
        if not columns:
            raise InputError(
                f"{piece.path}: expected columns among {', '.join(wanted)}; found"
                f" {', '.join(file.schema_arrow.names)}. Name the label and what is learned from."
            )
        named = _class_names(file.schema_arrow.metadata, label)
        row = piece.first_row
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
            values = [_values(batch.column(name)) for name in columns]
            for cells in zip(*values, strict=True):
                record = dict(zip(columns, cells, strict=True))
                if named:
                    record[label] = named.get(record.get(label))
                yield row, record
                row += 1


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str) -> dict[int | None, str]:
    """Code to name, where `datasets` wrote names of classes into the schema; else empty.

    A code without a name (-1 stands for an unlabelled row) has no class.
    """
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        names = found.get("info", {}).get("features", {}).get(label, {}).get("names", [])
    except (ValueError, AttributeError):
        return {}
    return {code: str(name) for code, name in enumerate(names)}


def _values(column: Any) -> Sequence[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    nested = nested or pa.types.is_fixed_size_list(kind)
    number = nested and (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    )
    if not number or column.null_count or column.flatten().null_count:
        return list(column.to_pylist())
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    return np.split(column.flatten().to_numpy(zero_copy_only=False), ends[:-1]) if len(ends) else []


# -- any piece -----------------------------------------------------------------------------------


def raw_rows(
    piece: DataPiece,
    reject: sources.Reject,
    *,
    label: str,
    image: str,
    text: str,
    features: str,
    wanted: Sequence[str],
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number from 1, row) of a piece, in order; rows that do not parse go to `reject`.

    Rows of images and arrays have the columns `label` and one of `image` (bytes, or uint8
    pixels), `text` and `features`; of Parquet the `wanted` columns alone are read.
    """
    if piece.kind == "image":
        data = Path(piece.path).read_bytes()
        parts = piece.name.split("/")
        yield 1, {image: data, label: parts[-2] if len(parts) > 1 else None}
    elif piece.kind == "builtin":
        pixels, digits = builtin_datasets.digits()
        for row in range(piece.start, piece.stop):
            yield row + 1, {image: pixels[row], label: int(digits[row])}
    elif piece.kind == "texts":
        for row, (said, chapter) in enumerate(builtin_texts.docstrings(), 1):
            yield row, {text: said, label: chapter}
    elif piece.arrays is not None:
        x, y = piece.arrays
        kind = array_kind(piece.name, x)
        column = {"image": image, "text": text, "features": features}[kind]
        both = zip(x.rows(piece.start, piece.stop), y.rows(piece.start, piece.stop), strict=True)
        for row, (value, code) in enumerate(both, piece.first_row):
            content = _pixels(value) if kind == "image" else value
            yield row, {column: str(value) if kind == "text" else content, label: code.item()}
    elif piece.kind == "csv":
        yield from _csv(piece, reject)
    elif piece.kind == "parquet":
        yield from _parquet(piece, label, wanted)
    else:
        rows = sources.Piece(
            piece.path,
            piece.name,
            cast(sources.RowFormat, piece.kind),
            piece.size,
            piece.start,
            piece.stop,
            piece.first_row,
        )
        for row, record, _ in sources.read_rows(rows, reject):
            yield row, record


def image_bytes(value: Any, beside: Path) -> bytes | npt.NDArray[np.uint8]:
    """The image that a cell holds: bytes, pixels, a path, or {bytes, path}.

    A path is relative to the folder `beside`, where the file of rows lies. Raises RowProblem
    without a key.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | np.ndarray):
        return value
    if not isinstance(value, str) or not value:
        raise RowProblem(
            "",
            f"expected bytes, {{bytes, path}} or a path; found {sources.shown(value)}.",
        )
    try:
        return (beside / value).read_bytes()
    except (OSError, ValueError) as error:
        raise RowProblem("", f"expected an image at {value!r}; found {error}.") from error
