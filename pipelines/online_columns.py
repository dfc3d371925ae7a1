"""Columns of the training set that travel beside the batches, and the ids of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .online_selection import sample_id, unique_ids
from .online_window import Batch, Ints, Piece, is_packed

COLUMNS = "prunery_columns"  # in a batch of the train loader: column to one value a sample


class SideColumns:
    """A collator that takes side columns out of the samples and lays them beside the batch.

    They never reach the model. A sample that lacks a column gives None there.
    """

    def __init__(self, collator: Any, names: Sequence[str]) -> None:
        self.collator = collator
        self.names = tuple(names)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate the samples without the side columns, then add these as plain lists."""
        plain = [{k: v for k, v in one.items() if k not in self.names} for one in samples]
        batch = dict(self.collator(plain))
        batch[COLUMNS] = {name: [one.get(name) for one in samples] for name in self.names}
        return batch


def identify(
    batches: Sequence[Batch], pieces: Sequence[Piece], columns: Sequence[Mapping[str, Any]]
) -> tuple[Ints, list[str]]:
    """(S,) int64 ids, unique in the window, and what the training set calls each sample."""
    given: Sequence[Any] = [None] * len(pieces)
    if "id" in columns[0]:
        given = column_values("id", batches, pieces, columns)
    cells = [batch["input_ids"].cpu().numpy() for batch in batches]
    ids = [
        sample_id(value, cells[piece.batch][piece.row, piece.start : piece.stop])
        for value, piece in zip(given, pieces, strict=True)
    ]
    names = [str(one if value is None else value) for value, one in zip(given, ids, strict=True)]
    return unique_ids(ids), names


def column_values(
    name: str,
    batches: Sequence[Batch],
    pieces: Sequence[Piece],
    columns: Sequence[Mapping[str, Any]],
) -> list[Any]:
    """The column's value for each sample of the window.

    Raises
    ------
    InputError
        Rows of the training set and documents of a packed batch are not the same number, or a
        row has no value.
    """
    found: list[Any] = []
    for number, batch in enumerate(batches):
        cells = columns[number].get(name)
        mine = [piece for piece in pieces if piece.batch == number]
        if cells is None or not _aligned(batch, mine, cells):
            raise InputError(
                f"column `{name}`: expected one value for each of the {len(mine)} samples of a"
                f" batch; found {'no such column' if cells is None else f'{len(cells)} values'}."
                " Packing drops columns: train without packing, or leave the column's method out."
            )
        of_row = cells if is_packed(batch) else [cells[piece.row] for piece in mine]
        if any(value is None for value in of_row):
            raise InputError(f"column `{name}` is empty in a row of the training set. Fill it in.")
        found += of_row
    return found


def _aligned(batch: Batch, pieces: Sequence[Piece], cells: Sequence[Any]) -> bool:
    """Is there one cell a sample? In a packed batch samples are documents, in order."""
    return len(cells) == (len(pieces) if is_packed(batch) else len(batch["input_ids"]))
