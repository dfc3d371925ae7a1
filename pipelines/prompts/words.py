"""Candidate words and few-shot rows as the tables hold them, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ...errors import InputError
from ...pruners import rules
from ...pruners.contract import FloatArray, IntArray
from ...storage import Table
from .tables import TRAIN


@dataclass(frozen=True, slots=True)
class Shots:
    """Rows of one part of a task, in the order of their shots: N texts, labels, shots, ids."""

    texts: list[str]
    labels: IntArray
    shot: IntArray
    ids: IntArray


@dataclass(frozen=True, slots=True)
class Words:
    """V candidate words with their row ids and, where a decision was taken, its scores."""

    texts: list[str]
    ids: IntArray
    score: FloatArray


def rows_of(task: Table, part: str = TRAIN) -> Shots:
    """The rows of a part of a `prompt_task` table, by shot, then class, then id."""
    found = task.to_table()
    found = found.filter(pc.equal(found.column("part"), part))
    made = {
        name: found.column(name).to_numpy().astype(np.int64) for name in ("label", "shot", "id")
    }
    order = np.lexsort((made["id"], made["label"], made["shot"]))
    texts = found.column("text").to_pylist()
    return Shots(
        [texts[place] for place in order],
        made["label"][order],
        made["shot"][order],
        made["id"][order],
    )


def words_of(table: Table) -> Words:
    """The kept words of a table that has `id`, `text` and `keep`: best first, ties by id.

    Without a `score` the order is that of the ids.

    Raises
    ------
    InputError
        No word is kept.
    """
    names = [name for name in ("id", "text", "keep", "score") if name in table.schema.names]
    found = table.to_table(names)
    found = found.filter(found.column("keep"))
    ids: npt.NDArray[np.int64] = found.column("id").to_numpy().astype(np.int64)
    score = (
        found.column("score").to_numpy().astype(np.float32)
        if "score" in names
        else np.zeros(len(ids), np.float32)
    )
    if not len(ids):
        raise InputError(
            f"`{table.manifest.name}` keeps no word, so there is nothing to ask about. Loosen the"
            " filter of prompt_vocabulary, or raise `keep` of prune_prompts."
        )
    order = rules.best_first(score, ids)
    texts = found.column("text").to_pylist()
    return Words([texts[place] for place in order], ids[order], score[order])
