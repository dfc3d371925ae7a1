"""Tables with an `embedding` as batches of checked unit vectors, and their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, RecipeError
from .dataset_tables import TRAIN
from .tables import among, vectors_of

if TYPE_CHECKING:
    from ..storage import Table, VectorIndex

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def check_vectors(table: Table) -> int:
    """Length of the table's vectors; RecipeError where it holds none."""
    names = table.schema.names
    kind = table.schema.field("embedding").type if "embedding" in names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise RecipeError(
            f"`{table.manifest.name}` must hold a column `embedding` of lists of one length;"
            f" found {kind or names}. Give the step the table of an embed or teacher_outputs step."
        )
    return int(kind.list_size)


def training_ids(data: Table) -> Ints:
    """Sorted ids of the training rows of a read_dataset table, (N,) int64."""
    found = [
        batch.column("id").filter(pc.equal(batch.column("split"), TRAIN)).to_numpy()
        for batch in data.batches(columns=["id", "split"])
    ]
    ids = np.concatenate(found) if found else np.zeros(0, np.int64)
    return refuse_repeats(data, np.sort(ids))


def row_numbers(table: Table, only: Ints | None) -> Ints:
    """Ids of the rows that `only` names (all where it is None), in the table's order, (N,).

    Raises
    ------
    InputError
        An id stands twice in the table, or an id of `only` is not in it.
    """
    found = [batch.column("id").to_numpy() for batch in table.batches(columns=["id"])]
    ids = np.concatenate(found) if found else np.zeros(0, np.int64)
    ordered = refuse_repeats(table, np.sort(ids))
    if only is None:
        return ids
    absent = only[~among(only, ordered)]
    if len(absent):
        raise InputError(
            f"`{table.manifest.name}` has no vector for {len(absent)} of {len(only)} rows, row"
            f" {int(absent[0])} among them. Make it from the same read_dataset table."
        )
    return ids[among(ids, only)]


def refuse_repeats(table: Table, ids: Ints) -> Ints:
    """Sorted ids of a table as they are; InputError where one stands twice."""
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise InputError(
            f"`{table.manifest.name}` holds row {int(twice[0])} twice, {len(twice)} rows too many."
            " Make it from a table whose ids differ."
        )
    return ids


def unit_batches(
    table: Table, only: Ints | None = None, *, shard: int | None = None
) -> Iterator[tuple[Ints, Floats]]:
    """Ids (B,) and embeddings (B, d) float32 of the rows, scaled to length 1; 0 stays 0.

    `only` holds the sorted ids that are wanted; `shard` is the one to read, None for all.

    Raises
    ------
    InputError
        A vector is not finite; the message names its row.
    """
    columns = ["id", "embedding"]
    read = table.batches(columns) if shard is None else table.shard_batches(shard, columns)
    for batch in read:
        ids = batch.column("id").to_numpy()
        vectors = vectors_of(batch.column("embedding"))
        if only is not None:
            wanted = among(ids, only)
            ids, vectors = ids[wanted], vectors[wanted]
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            bad = int(ids[finite.argmin()])
            raise InputError(
                f"`{table.manifest.name}`: expected finite embeddings, found NaN or infinity in"
                f" row {bad}. Mend or drop that row and make the vectors again."
            )
        if len(ids):
            # In float64: the square of a large number must not overflow.
            length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
            scale = np.where(length == 0, 1.0, length)[:, None]
            yield ids, (vectors / scale).astype(np.float32)


def nearest_others(
    index: VectorIndex, ids: Ints, vectors: Floats, k: int, *, threads: int | None = None
) -> tuple[Ints, Floats]:
    """The k nearest rows of an index to each row, itself left out: ids and scores, two (B, k).

    As `VectorIndex.search`: -1 where there are fewer.
    """
    found, scores = index.search(vectors, k + 1, threads=threads)
    itself = found == ids[:, None]
    # A row that did not find itself (among many copies of it) gives up the last one found.
    itself[~itself.any(axis=1), -1] = True
    shape = (len(ids), k)
    return found[~itself].reshape(shape), scores[~itself].reshape(shape)
