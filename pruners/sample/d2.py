"""D2: hard rows in dense places, spread out by messages over a graph of neighbours."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import InputError
from .. import rules
from ..contract import (
    Budget,
    FloatArray,
    IntArray,
    Scope,
    Selection,
    Signals,
    Unit,
    check_fraction,
)
from ..trajectory import Float64Array
from .difficulty import hardest, keep_uncut_first


@dataclass(frozen=True, slots=True, kw_only=True)
class D2:
    """Keep hard rows spread over a graph of neighbours (D2 pruning, arXiv:2310.07931).

    Forward, once: x_i = difficulty_i + sum over i's neighbours j of exp(-d_ij) * difficulty_j,
    so hard rows in dense places are highest. Then again and again the row i of highest x is
    taken, ties to the smaller id, and each of its neighbours loses exp(-gamma * d_ij) * x_i, so
    that the next one comes from elsewhere. (Where x_i is below 0 by then, they gain.)

    Messages go along a row's own list of neighbours, in `neighbour` and `neighbour_distance`;
    d is the distance itself, not its square. Ids that are not among the rows, or are cut, take
    no part. score = minus the place in which a row was taken; rows never taken follow by the x
    that they were left with, cut rows come last and easiest first. A larger `keep` goes on
    where a smaller one stopped.

    Departures: `difficulty` is stretched to [0, 1] over the rows that are not cut, all 1 where
    it is constant, as a message of negative difficulty would turn dense places into thin ones;
    the forward gamma is 1, as in the authors' code. O(N k) memory and O(N k log N) time.

    Measured (benchmarks/RESULTS.md, MNIST, difficulty by AUM): better than random rows with
    clean labels; with 20 % wrong ones worse or level without a teacher, level or 0.1 points
    better with one.

    Attributes
    ----------
    keep
        Fraction of rows to keep; exactly ceil(keep * N).
    gamma
        How fast the reverse message fades with distance, 0 or more.
    cutoff
        Fraction of the hardest rows to cut first (`ccs`).
    """

    unit: ClassVar[Unit] = "sample"
    needs: ClassVar[frozenset[str]] = frozenset(
        {"id", "difficulty", "neighbour", "neighbour_distance"}
    )
    optional: ClassVar[frozenset[str]] = frozenset()
    budget: ClassVar[Budget] = Budget("keep", "fraction")
    scope: ClassVar[Scope] = "table"
    group: ClassVar[str | None] = None
    keep: float = 0.5
    gamma: float = 0.1
    cutoff: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_fraction("cutoff", self.cutoff)
        if not 0 <= self.gamma < np.inf:
            raise InputError(f"`gamma` must be 0 or more, and finite; found {self.gamma}.")

    def __call__(self, signals: Signals, *, seed: int) -> Selection:
        """Decide for N rows; raises InputError where a signal is missing or not finite.

        So does a graph whose `neighbour` and `neighbour_distance` differ in width.
        """
        ids = signals.require(self.needs)["id"]
        if signals["neighbour"].shape != signals["neighbour_distance"].shape:
            raise InputError(
                "`neighbour` and `neighbour_distance` must have one entry for each neighbour;"
                f" found {signals['neighbour'].shape} and {signals['neighbour_distance'].shape}."
                " Take both from one table."
            )
        cut = hardest(signals["difficulty"], ids, self.cutoff)
        # In the order of ids: the first of equal rows is then the smallest id.
        rows = np.flatnonzero(~cut)
        rows = rows[np.argsort(ids[rows])]
        neighbour = positions(signals["neighbour"][rows], ids[rows])
        distance = signals["neighbour_distance"][rows]
        x = forward(stretched(signals["difficulty"][rows]), neighbour, distance)
        reverse = np.exp(-self.gamma * distance.astype(np.float64))
        count = min(rules.count_of(len(ids), self.keep), len(rows))
        place = np.zeros(len(ids), np.int64)
        place[rows] = places(x, neighbour, reverse, count)
        return keep_uncut_first(signals, place, cut, self.keep)


def positions(neighbour: IntArray, ids: IntArray) -> IntArray:
    """Place of each neighbour (N, k) among ascending ids (N,); -1 for others and for itself."""
    n = len(ids)
    if n == 0:
        return neighbour
    place = np.minimum(np.searchsorted(ids, neighbour), n - 1)
    known = (ids[place] == neighbour) & (place != np.arange(n)[:, None])
    return np.where(known, place, -1)


def stretched(difficulty: FloatArray) -> Float64Array:
    """Difficulty (N,) stretched to [0, 1], float64; all 1 where it is constant."""
    wide = difficulty.astype(np.float64)
    low, high = wide.min(initial=np.inf), wide.max(initial=-np.inf)
    return (wide - low) / (high - low) if high > low else np.ones(len(wide))


def forward(difficulty: Float64Array, neighbour: IntArray, distance: FloatArray) -> Float64Array:
    """Each row's difficulty and, faded by distance, that of its neighbours: (N,) float64."""
    x = difficulty.copy()
    for column in range(neighbour.shape[1]):
        near = neighbour[:, column]
        message = np.exp(-distance[:, column].astype(np.float64)) * difficulty[near]
        x += np.where(near >= 0, message, 0.0)
    return x


def places(x: Float64Array, neighbour: IntArray, reverse: Float64Array, count: int) -> IntArray:
    """Place of each of N rows: the first `count` as they are taken, the rest by what is left.

    `neighbour` (N, k) positions or -1, `reverse` (N, k) what a message is multiplied by.
    """
    value: list[float] = x.tolist()
    place = np.full(len(value), -1, np.int64)
    taken = bytearray(len(value))
    # A row may stand in the heap with an old value: lowered rows are pushed again when they
    # come up, raised ones at once.
    heap = [(-level, row) for row, level in enumerate(value)]
    heapq.heapify(heap)
    picked = 0
    while picked < count:
        level, row = heapq.heappop(heap)
        if taken[row]:
            continue
        own = value[row]
        if -level != own:
            heapq.heappush(heap, (-own, row))
            continue
        taken[row], place[row] = 1, picked
        picked += 1
        for near, share in zip(neighbour[row].tolist(), reverse[row].tolist(), strict=True):
            if near >= 0 and not taken[near]:
                value[near] -= share * own
                if own < 0:
                    heapq.heappush(heap, (-value[near], near))
    rest = np.flatnonzero(place < 0)
    place[rest[np.argsort(-np.array(value)[rest], kind="stable")]] = np.arange(count, len(value))
    return place
