"""Few-shot parts of a labelled set: rows to search on, rows to judge with, rows to test on.

The reference takes the first N rows of each class and, for its GLUE tasks, validates on the rows
that it searched on. Here rows are drawn by a hash of (seed, id), and no text stands in two parts.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...pruners import rules
from ...pruners.contract import IntArray
from .tables import PARTS, TEST, TRAIN, VALIDATION

# Reasons of the rows that are in no part, besides `seen_in_train` and `seen_in_validation`.
REPEATED = "repeated"
NOT_DRAWN = "not_drawn"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row of a part.

    Attributes
    ----------
    row
        Place among the rows that were drawn from.
    shot
        Place within its class and part, from 0: the rows with `shot` < s are as many of each
        class.
    """

    row: int
    part: str
    shot: int
    label: int


@dataclass(slots=True)
class Parts:
    """What was drawn, in the order part, shot, label, and why the other rows were not."""

    rows: list[Drawn] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def text_key(text: str) -> str:
    """What texts are compared by: NFKC, runs of white space as one space, case folded."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def draw_parts(
    ids: IntArray,
    labels: IntArray,
    is_test: npt.NDArray[np.bool_],
    texts: Sequence[str],
    classes: Sequence[str],
    *,
    shots: int,
    validation_shots: int,
    test_rows: int | None,
    draw: Literal["random", "first"],
    seed: int,
) -> Parts:
    """Draw train and validation parts from the training split, and the test part from the other.

    Train is filled first, then validation, then test; a row whose text stands in an earlier part
    is dropped as `seen_in_train` or `seen_in_validation`, one whose text stands in its own part
    (with whatever label) as `repeated`. The test part is drawn uniformly over its rows, whatever
    `draw` says, so it has the classes' shares; `draw` is about the shots alone.

    Parameters
    ----------
    ids, labels, is_test, texts
        Of N rows, (N,): int64, codes of the classes from 0, whether held out, and texts.

    Raises
    ------
    InputError
        A class has fewer distinct training texts than shots, or no test row is left.
    """
    drawn = np.lexsort((ids, rules.uniform(seed, ids)))
    order = drawn if draw == "random" else np.arange(len(ids))
    drawer = _Drawer(labels, texts)
    training = order[~is_test[order]]
    for part, quota in ((TRAIN, shots), (VALIDATION, validation_shots)):
        drawer.fill(part, training, np.full(len(classes), quota), most=quota * len(classes))
    _check_shots(drawer, labels[~is_test], classes, shots, validation_shots)
    testing = drawn[is_test[drawn]]
    most = len(testing) if test_rows is None else test_rows
    drawer.fill(TEST, testing, np.full(len(classes), len(testing)), most=most)
    made = drawer.parts
    if not any(row.part == TEST for row in made.rows):
        raise InputError(
            f"expected rows for the part `test`; found {len(testing)} in the test split, of which"
            f" {made.dropped['seen_in_train'] + made.dropped['seen_in_validation']} repeat a text"
            " of the parts before. Raise `holdout` of `read_dataset`, or give it `test_path`."
        )
    made.dropped[NOT_DRAWN] = len(ids) - len(made.rows) - sum(made.dropped.values())
    made.dropped = +made.dropped
    made.rows.sort(key=lambda row: (PARTS.index(row.part), row.shot, row.label))
    return made


class _Drawer:
    """Fills one part after another from rows that no part has looked at."""

    def __init__(self, labels: IntArray, texts: Sequence[str]) -> None:
        self.parts = Parts()
        self.filled: dict[str, Counter[int]] = {}
        self._labels = labels
        self._texts = texts
        self._part_of: dict[str, str] = {}  # text key -> the part that has it
        self._done: set[int] = set()

    def fill(self, part: str, order: Iterable[int], quota: IntArray, most: int) -> None:
        """Take rows in `order` up to `quota` (C,) a class and `most` in all."""
        filled = self.filled.setdefault(part, Counter())
        left = most
        for place in order:
            row = int(place)
            label = int(self._labels[row])
            if left == 0:
                return
            if row in self._done or filled[label] >= quota[label]:
                continue
            self._done.add(row)
            key = text_key(self._texts[row])
            before = self._part_of.setdefault(key, "")
            if before:
                self.parts.dropped[REPEATED if before == part else f"seen_in_{before}"] += 1
                continue
            self._part_of[key] = part
            self.parts.rows.append(Drawn(row, part, filled[label], label))
            filled[label] += 1
            left -= 1


def _check_shots(
    drawer: _Drawer, labels: IntArray, classes: Sequence[str], shots: int, validation_shots: int
) -> None:
    for code, name in enumerate(classes):
        got = [drawer.filled[part][code] for part in (TRAIN, VALIDATION)]
        if got != [shots, validation_shots]:
            raise InputError(
                f"class {name!r}: expected {shots} rows to search on and {validation_shots} to"
                f" judge with; found {int((labels == code).sum())} rows in the training split, of"
                f" which {sum(got)} have a text of their own. Lower `shots` or"
                " `validation_shots`, lower `holdout` of `read_dataset`, or read more rows."
            )
