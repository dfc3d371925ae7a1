"""Labelled rows of any file become rows of one table: class codes, splits, what is learned from.

The plan passes over all rows once (`survey`): class names in a fixed order, the commonest size,
rows in each split. The shards pass over them again and write (`examples`). Neither holds more
than a batch of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import InputError
from ..pruners import rules
from ..storage import row_id
from . import sources
from .dataset_files import SPLITS, DataPiece, array_kind, image_bytes, raw_rows
from .dataset_images import Pixels, Size, look, stored
from .dataset_tables import DATASET, TEST, TRAIN
from .sources import RowProblem, shown

Kind = Literal["image", "text", "features"]
SplitBy = Literal["field", "path", "place", "content"]
UNKNOWN = -1
"""`clean_label` where no noise was planted."""

_ROWS_LOOKED_AT = 20
_ROWS_A_BATCH = 1024
_REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns of rows, dotted where nested; `features` is one list or many numbers."""

    label: str = "label"
    split: str | None = None
    group: str | None = None
    text: str = "text"
    features: str | tuple[str, ...] = "features"
    image: str = "image"

    @property
    def wanted(self) -> list[str]:
        """Every column that is read."""
        many = [self.features] if isinstance(self.features, str) else [*self.features]
        named = [self.label, self.text, self.image, *many, self.split, self.group]
        return [name for name in named if name]


@dataclass(frozen=True, slots=True)
class Example:
    """One row that is usable by itself; `size` is (H, W), (d,) or ()."""

    row: int
    label: str
    split: str
    group: str
    text: str
    features: npt.NDArray[np.float32]
    image: bytes | Pixels
    size: tuple[int, ...]
    channels: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a survey fixed for all shards.

    Attributes
    ----------
    classes
        Names in the order of their codes.
    size
        (H, W) of every image, (d,) of every row of features, () of text; other rows are
        rejected, or, with `resize`, resized.
    split_by
        What decides the split: a field, the path (test_path), the names of files and folders,
        or the digest of the content with the share `holdout`.
    noise
        Share of the training labels to flip.
    """

    kind: Kind
    columns: Columns
    classes: tuple[str, ...]
    size: tuple[int, ...]
    channels: int
    resize: bool
    split_by: SplitBy
    holdout: float
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over all rows found.

    `images` is a digest of the images that rows name by path, "" where none does.
    """

    layout: Layout
    rows: Mapping[str, int]
    images: str
    remarks: list[str] = field(default_factory=list)

    @property
    def shape(self) -> list[int]:
        """[channels, height, width], [d] or []."""
        size = [*self.layout.size]
        return [self.layout.channels, *size] if self.layout.kind == "image" else size


# -- one row -------------------------------------------------------------------------------------


def kind_of(pieces: Sequence[DataPiece], columns: Columns, wanted: Kind | None) -> Kind:
    """What is learned from: said by the caller, by the files, or by the columns of their rows.

    Raises
    ------
    InputError
        Files differ, the first rows have none of the columns, or several of them.
    """
    kinds: dict[Kind, str] = {}
    for piece in {piece.path: piece for piece in reversed(pieces)}.values():
        if piece.kind in ("image", "builtin"):
            kinds["image"] = piece.name
        elif piece.kind == "texts":
            kinds["text"] = piece.name
        elif piece.arrays is not None:
            kinds[array_kind(piece.name, piece.arrays[0])] = piece.name
        elif wanted is not None:
            kinds[wanted] = piece.name
        else:
            found = _kind_of_rows(piece, columns)
            kinds |= {found: piece.name} if found else {}
    if (wanted is not None and kinds.keys() - {wanted}) or len(kinds) > 1:
        raise InputError(
            f"expected rows of one kind{f' ({wanted})' if wanted else ''}; found"
            f" {', '.join(f'{kind} in {name}' for kind, name in kinds.items())}. Read them apart."
        )
    if not kinds:
        raise InputError(f"found no row in {', '.join(sorted({p.name for p in pieces})[:5])}.")
    return next(iter(kinds))


def _kind_of_rows(piece: DataPiece, columns: Columns) -> Kind | None:
    """By the columns of a file's first rows; None where it has no row."""
    if isinstance(columns.features, tuple):
        return "features"
    named: dict[Kind, str] = {
        "image": columns.image,
        "text": columns.text,
        "features": columns.features,
    }
    first = list(islice(_raw(piece, columns, lambda *bad: None), _ROWS_LOOKED_AT))
    met = [
        kind
        for kind, name in named.items()
        if any(_cell(record, name) is not None for _, record in first)
    ]
    if not first or len(met) == 1:
        return met[0] if first else None
    names = ", ".join(named.values())
    if met:
        raise InputError(
            f"{piece.name}: expected one of the columns {names}; found {len(met)} of them. Set"
            f" `kind` to one of {', '.join(met)}."
        )
    raise InputError(
        f"{piece.name}, row {first[0][0]}: expected one of the columns {names}; found"
        f" {', '.join(map(str, first[0][1])) or 'none'}. Set `text_field`, `features` or"
        " `image_field`."
    )


def _raw(
    piece: DataPiece, columns: Columns, reject: sources.Reject
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    listed = columns.features if isinstance(columns.features, str) else "features"
    return raw_rows(
        piece,
        reject,
        label=columns.label,
        image=columns.image,
        text=columns.text,
        features=listed,
        wanted=columns.wanted,
    )


def _cell(record: Mapping[str, Any], name: str) -> Any:
    """The value under a name, dotted where nested; None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _label(value: Any, name: str) -> str:
    """The class as text: whole numbers without a point."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return _whole(value.strip(), name)
    raise RowProblem(name, f"expected a class (text or a whole number); found {shown(value)}.")


def _whole(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(name, f"the text is not UTF-8 at character {error.start}.") from error
    return text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowProblem(name, f"expected text; found {shown(value)}.")
    return _whole(value, name)


def _group(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowProblem(name, f"expected the name of a group; found {shown(value)}.")
    return _whole(str(value), name)


def _split(value: Any, name: str) -> str:
    found = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        known = ", ".join(SPLITS)
        raise RowProblem(name, f"expected a split among {known}; found {shown(value)}.")
    return found


def _features(record: Mapping[str, Any], names: str | tuple[str, ...]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        if isinstance(names, str):
            values = _numbers(_cell(record, names), names)
        else:
            numbers = [_number(_cell(record, name), name) for name in names]
            values = np.array(numbers).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        name = f"{names}[{bad[0]}]" if isinstance(names, str) else names[bad[0]]
        raise RowProblem(name, "expected a finite number that float32 holds.")
    return values


def _numbers(cells: Any, name: str) -> npt.NDArray[np.float32]:
    try:
        values = np.asarray([] if isinstance(cells, str | Mapping) else cells, np.float32)
    except (TypeError, ValueError) as error:
        raise RowProblem(name, f"expected a list of numbers ({error}).") from error
    if values.ndim != 1 or not len(values):
        raise RowProblem(name, f"expected a list of numbers; found {shown(cells)}.")
    return values


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RowProblem(name, f"expected a number; found {shown(value)}.") from error


def _example(
    piece: DataPiece, row: int, record: Mapping[str, Any], kind: Kind, c: Columns
) -> Example:
    label = _label(_cell(record, c.label), c.label)
    split = _split(_cell(record, c.split), c.split) if c.split else piece.split
    group = _group(_cell(record, c.group), c.group) if c.group else ""
    text, features = "", np.zeros(0, np.float32)
    image: bytes | Pixels = b""
    size: tuple[int, ...] = ()
    channels = 0
    if kind == "text":
        text = _text(_cell(record, c.text), c.text)
        content = text.encode()
    elif kind == "features":
        features = _features(record, c.features)
        size, content = (len(features),), features.astype("<f4").tobytes()
    else:
        image = image_bytes(_cell(record, c.image), Path(piece.path).parent)
        size, channels = look(image)
        content = image if isinstance(image, bytes) else _pixel_bytes(image)
    digest = hashlib.sha256(kind.encode() + b":" + content).digest()
    return Example(row, label, split, group, text, features, image, size, channels, digest)


def _pixel_bytes(image: Pixels) -> bytes:
    """What the digest of pixels is taken of: not the PNG made of them, for compressors differ."""
    return repr(image.shape).encode() + image.tobytes()


def _examples(
    pieces: Sequence[DataPiece], kind: Kind, columns: Columns, reject: sources.Reject
) -> Iterator[tuple[DataPiece, Example, Mapping[str, Any]]]:
    for piece in pieces:
        for row, record in _raw(piece, columns, reject):
            try:
                found = _example(piece, row, record, kind, columns)
            except RowProblem as problem:
                _refuse(reject, piece, row, record, problem, columns)
                continue
            yield piece, found, record


def _refuse(
    reject: sources.Reject,
    piece: DataPiece,
    row: int,
    record: Mapping[str, Any],
    problem: RowProblem,
    columns: Columns,
) -> None:
    """Tell `reject` of a row; a problem without a key is about the image."""
    column = problem.key or columns.image
    where = piece.name if piece.kind == "image" else f"{piece.name}, row {row}, column {column}"
    reject(_small(record), problem.reason, where)


def _small(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row for the table of rejects: numbers and the first characters of text."""
    return {
        str(name): value if isinstance(value, int | float | None) else str(value)[:200]
        for name, value in record.items()
        if not isinstance(value, bytes | np.ndarray | Mapping)
    }


# -- the survey ----------------------------------------------------------------------------------


def survey(
    pieces: Sequence[DataPiece],
    columns: Columns,
    *,
    kind: Kind | None = None,
    split_by: SplitBy = "content",
    holdout: float = 0.2,
    image_size: Size | None = None,
    noise: float = 0.0,
) -> Survey:
    """Pass over all rows: classes, size, splits. Rows that are unusable do not count.

    Raises
    ------
    InputError
        No row is usable (the first reasons are named), or noise is asked of one class.
    """
    kind = kind_of(pieces, columns, kind)
    reasons: list[str] = []
    images = hashlib.sha256()
    by_path = False

    def reject(row: Mapping[str, Any], reason: str, where: str) -> None:
        if len(reasons) < _REASONS_SHOWN:
            reasons.append(f"\n  {where}: {reason}")

    seen: Counter[tuple[str, str, tuple[int, ...], int]] = Counter()
    for piece, example, record in _examples(pieces, kind, columns, reject):
        split = split_of(example, split_by, holdout)
        seen[split, example.label, example.size, example.channels] += 1
        if kind == "image" and piece.kind in ("csv", "jsonl", "json", "parquet"):
            cell = _cell(record, columns.image)
            by_path |= isinstance(cell, str) or (
                isinstance(cell, Mapping) and not cell.get("bytes")
            )
            images.update(example.digest)
    if not seen:
        raise InputError(
            f"found no usable row in {', '.join(sorted({piece.name for piece in pieces})[:5])}."
            + "".join(reasons)
        )
    resize = kind == "image" and image_size is not None
    size = image_size if image_size is not None and resize else _commonest(seen)
    fitting = [key for key in seen if resize or key[2] == size]
    rows = {TRAIN: 0, TEST: 0}
    for key in fitting:
        rows[key[0]] += seen[key]
    classes = _in_order({label for _, label, _, _ in fitting})
    if noise > 0 and len(classes) < 2:
        raise InputError(
            f"labels can be flipped between two classes or more; found {', '.join(classes)} alone."
            " Set `flip_labels` to 0."
        )
    layout = Layout(
        kind=kind,
        columns=columns,
        classes=classes,
        size=size,
        channels=max(key[3] for key in fitting),
        resize=resize,
        split_by=split_by,
        holdout=holdout,
        noise=noise,
    )
    trained = {label for split, label, _, _ in fitting if split == TRAIN}
    return Survey(
        layout, rows, images.hexdigest() if by_path else "", _remarks(layout, rows, trained)
    )


def _commonest(seen: Mapping[tuple[str, str, tuple[int, ...], int], int]) -> tuple[int, ...]:
    """The size of most rows; of several the smallest."""
    sizes: Counter[tuple[int, ...]] = Counter()
    for (_, _, size, _), count in seen.items():
        sizes[size] += count
    return min(sizes, key=lambda size: (-sizes[size], size))


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted; as numbers where all are numbers."""

    def number(label: str) -> float:
        try:
            return float(label)
        except ValueError:
            return math.nan

    numbers = {label: number(label) for label in labels}
    if all(math.isfinite(value) for value in numbers.values()):
        return tuple(sorted(labels, key=lambda label: (numbers[label], label)))
    return tuple(sorted(labels))


def _remarks(layout: Layout, rows: Mapping[str, int], trained: set[str]) -> list[str]:
    made = []
    if len(layout.classes) == 1:
        made.append(f"one class alone: {layout.classes[0]}")
    lone = [name for name in layout.classes if name not in trained]
    if lone:
        made.append(f"classes in the test split alone: {', '.join(lone)}")
    made += [f"no row in the split {split}" for split in (TRAIN, TEST) if not rows[split]]
    return made


def split_of(example: Example, split_by: SplitBy, holdout: float) -> str:
    """train or test. By content, copies of a row fall on one side."""
    if split_by != "content":
        return example.split
    return TEST if row_id("holdout", example.digest) < holdout * 2.0**63 else TRAIN


def planted(
    ids: npt.NDArray[np.int64],
    label: npt.NDArray[np.int64],
    *,
    classes: int,
    share: float,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Labels (N,) with about `share` of them flipped to another class, each equally likely.

    Whether and where to is decided by a hash of (seed, id) of its own: one that no method which
    draws rows by `rules.uniform(seed, ids)` shares, or it would find the noise by chance.
    """
    if share <= 0:
        return label
    own = (rules.mix(ids.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)
    draw = rules.uniform(seed, own)
    other = np.floor(np.minimum(draw, share) / share * (classes - 1)).astype(np.int64)
    other = np.minimum(other, classes - 2)
    return np.where(draw < share, other + (other >= label), label)


# -- rows of the table ---------------------------------------------------------------------------


def dataset_rows(
    pieces: Sequence[DataPiece], layout: Layout, reject: sources.Reject, *, seed: int
) -> Iterator[pa.Table]:
    """Rows of the DATASET schema from some pieces, in order; unusable ones go to `reject`."""
    codes = {name: code for code, name in enumerate(layout.classes)}
    made: list[tuple[DataPiece, Example, bytes]] = []
    for piece, example, record in _examples(pieces, layout.kind, layout.columns, reject):
        try:
            image = _fitting(example, layout, codes)
        except RowProblem as problem:
            _refuse(reject, piece, example.row, record, problem, layout.columns)
            continue
        made.append((piece, example, image))
        if len(made) >= _ROWS_A_BATCH:
            yield _table(made, layout, codes, seed)
            made.clear()
    if made:
        yield _table(made, layout, codes, seed)


def _fitting(example: Example, layout: Layout, codes: Mapping[str, int]) -> bytes:
    """The image as stored, b"" for other kinds; refuses a row of another size."""
    if layout.kind != "image":
        if example.size != layout.size:
            raise RowProblem(
                str(layout.columns.features),
                f"expected {layout.size[0]} numbers, as most rows have; found {example.size[0]}.",
            )
    elif example.size != layout.size and not layout.resize:
        raise RowProblem(
            layout.columns.image,
            f"expected {layout.size[0]} x {layout.size[1]} pixels, as most images have; found"
            f" {example.size[0]} x {example.size[1]}. Set `image_size` to resize all.",
        )
    if example.label not in codes:
        raise RowProblem(
            layout.columns.label,
            f"expected a class that was there when the files were scanned; found"
            f" {example.label!r}. Run again.",
        )
    if layout.kind != "image":
        return b""
    return stored(example.image, (layout.size[0], layout.size[1]))


def _table(
    made: Sequence[tuple[DataPiece, Example, bytes]],
    layout: Layout,
    codes: Mapping[str, int],
    seed: int,
) -> pa.Table:
    examples = [example for _, example, _ in made]
    ids = np.array([row_id(piece.name, e.row, e.digest) for piece, e, _ in made], np.int64)
    clean = np.array([codes[example.label] for example in examples], np.int64)
    splits = [split_of(example, layout.split_by, layout.holdout) for example in examples]
    label = planted(ids, clean, classes=len(codes), share=layout.noise, seed=seed)
    label = np.where(np.array(splits) == TRAIN, label, clean)
    lengths = [len(example.features) for example in examples]
    features = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()),
        pa.array(np.concatenate([example.features for example in examples])),
    )
    columns = {
        "id": ids,
        "source": [
            piece.name if piece.kind == "image" else f"{piece.name}#{example.row}"
            for piece, example, _ in made
        ],
        "split": splits,
        "label": label,
        "clean_label": clean if layout.noise > 0 else np.full(len(ids), UNKNOWN),
        "group": [example.group for example in examples],
        "text": [example.text for example in examples],
        "features": features,
        "image": [image for *_, image in made],
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, DATASET.field(name).type)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(
        [a.cast(f.type) for a, f in zip(arrays, DATASET, strict=True)], schema=DATASET
    )
