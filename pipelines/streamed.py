"""Rules over scores that do not fit memory: the same rows as in memory, in a few passes.

A rule over a whole table needs to know where its border lies: the k-th best row. It is found
digit by digit: one pass counts the rows by the first digit of their sort key, the next one those
of the digit that holds the border by their second digit, and so on, until so few rows are left
that they can be sorted. Memory is that of the counts (2 MB) and of those rows (24 MB), whatever
the number of rows N; two passes are usual, and equal scores take a few more, over digits of the
id. With the border known, rows are decided batch by batch in any order.

Ids must be unique: rows with one id and one score are kept or dropped together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..pruners import rules
from ..pruners.contract import (
    BoolArray,
    FloatArray,
    IntArray,
    Selection,
    check_count,
    check_fraction,
)
from ..pruners.sample.ccs import strata_of
from ..pruners.sample.difficulty import CUT_REASONS

Batches = Callable[[], Iterable[tuple[IntArray, FloatArray]]]
"""Gives the same batches of ids (n,) int64 and scores (n,) float32 at every call."""

TOP_REASONS = ("in_fraction", "beyond_fraction")

_U64 = npt.NDArray[np.uint64]
_Keys = Callable[[], Iterator[tuple[IntArray, _U64, _U64]]]
"""Batches of (group, high, low): rows of a group in the order of (high, low)."""

_COUNTERS = 1 << 18
_SORTED = 1 << 20
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True, slots=True)
class Border:
    """A row's place in the order of (high, low) keys."""

    high: int
    low: int

    def upto(self, high: _U64, low: _U64) -> BoolArray:
        """(n,) bool: rows that do not come after the border."""
        equal = high == np.uint64(self.high)
        kept = (high < np.uint64(self.high)) | (equal & (low <= np.uint64(self.low)))
        return np.asarray(kept, np.bool_)


@dataclass(frozen=True, slots=True)
class TopFraction:
    """`rules.top_fraction` over N streamed rows; made by `top_fraction_streamed`.

    Attributes
    ----------
    rows, kept
        N and ceil(keep * N).
    threshold
        The lowest kept score; NaN where none is kept.
    """

    rows: int
    kept: int
    threshold: float
    border: Border | None

    def decide(self, ids: IntArray, scores: FloatArray) -> Selection:
        """The decision about some rows, (n,) each; score = the score given."""
        keep = np.zeros(len(ids), np.bool_)
        if self.border is not None:
            keep = self.border.upto(_descending(scores), _of_ids(ids))
        threshold = np.full(len(ids), self.threshold, np.float32)
        return Selection(keep, scores, (~keep).astype(np.uint8), TOP_REASONS, threshold)


@dataclass(frozen=True, slots=True)
class StreamedCcs:
    """`pruners.sample.ccs` over N streamed rows; made by `ccs_streamed`.

    Attributes
    ----------
    rows, kept
        N and ceil(keep * N).
    seed, strata
        As given.
    uncut
        The hardest row that is not cut, in the order of (difficulty, id); None where all are.
    refilled
        The hardest kept row, where the budget reaches into the cut rows; else None.
    low, high
        Range of difficulty that is divided into strata.
    draws
        For each stratum the first row of its draw that is not in everybody's share, and whether
        that row is kept; None for a stratum that is kept whole. Empty where all uncut rows are
        kept.
    """

    rows: int
    kept: int
    seed: int
    strata: int
    uncut: Border | None = None
    refilled: Border | None = None
    low: float = 0.0
    high: float = 0.0
    draws: tuple[tuple[Border, bool] | None, ...] = ()

    def decide(self, ids: IntArray, scores: FloatArray) -> Selection:
        """The decision about some rows, (n,) each; score = the difficulty given.

        The score that the method stores in memory, minus the place in the draw, would need all
        draws sorted.
        """
        cut = self.cut(ids, scores)
        keep = ~cut
        if self.refilled is not None:
            keep = self.refilled.upto(_ascending(scores), _of_ids(ids))
        left = np.flatnonzero(~cut)
        if self.draws and len(left):
            keep[left] = self._drawn(ids[left], scores[left])
        reason = np.where(keep, np.where(cut, 3, 0), np.where(cut, 2, 1)).astype(np.uint8)
        return Selection(keep, scores, reason, CUT_REASONS)

    def cut(self, ids: IntArray, scores: FloatArray) -> BoolArray:
        """(n,) bool: rows among the hardest that are cut."""
        if self.uncut is None:
            return np.ones(len(ids), np.bool_)
        return ~self.uncut.upto(_ascending(scores), _of_ids(ids))

    def stratum(self, scores: FloatArray) -> IntArray:
        """Stratum of rows that are not cut, (n,) int64."""
        ends = np.array([self.low, self.high], np.float32)
        return strata_of(np.concatenate([ends, scores]), self.strata)[2:]

    def _drawn(self, ids: IntArray, scores: FloatArray) -> BoolArray:
        everything = Border(2**64 - 1, 2**64 - 1)
        borders = [everything if found is None else found[0] for found in self.draws]
        taken = np.array([found is None or found[1] for found in self.draws])
        stratum = self.stratum(scores)
        high, low = _draw(self.seed, ids), _of_ids(ids)
        border_high = np.array([border.high for border in borders], np.uint64)[stratum]
        border_low = np.array([border.low for border in borders], np.uint64)[stratum]
        before = (high < border_high) | ((high == border_high) & (low < border_low))
        at = (high == border_high) & (low == border_low)
        return np.asarray(before | (at & taken[stratum]), np.bool_)


def top_fraction_streamed(batches: Batches, keep: float) -> TopFraction:
    """Find the border of `rules.top_fraction`: the same rows kept, ties to the smaller id.

    Parameters
    ----------
    batches
        Read two to six times: see `Batches`.
    keep
        Fraction of the N rows; exactly ceil(keep * N) are kept.

    Raises
    ------
    InputError
        `keep` is no fraction, or a score is not finite (the row's id is named).
    """
    check_fraction("keep", keep)
    found = [0, 0]

    def ranks(sizes: IntArray) -> IntArray:
        found[:] = int(sizes[0]), rules.count_of(int(sizes[0]), keep)
        return np.array([found[1] - 1])

    [border] = _select(_by_score(batches, _descending), ranks, groups=1, bits=32)
    rows, kept = found
    return TopFraction(rows, kept, _score(border, descending=True), border)


def ccs_streamed(
    batches: Batches, keep: float, *, cutoff: float = 0.1, strata: int = 50, seed: int
) -> StreamedCcs:
    """Find the borders of the method ccs: the same rows kept as `pruners.sample.ccs.Ccs` keeps.

    Scores are difficulties, higher = harder. One departure: places in a draw are whole numbers
    here, where the method's score holds them as float32, so in strata of more than 16.7 million
    rows the two part.

    Parameters
    ----------
    batches
        Read four times and more: see `Batches`.
    keep, cutoff, strata, seed
        As for the method.

    Raises
    ------
    InputError
        A fraction or count is out of range, or a score is not finite (the row's id is named).
    """
    check_fraction("keep", keep)
    check_fraction("cutoff", cutoff)
    check_count("strata", strata, low=1)
    lowest, rows, left = math.inf, 0, 0

    def by_difficulty() -> Iterator[tuple[IntArray, _U64, _U64]]:
        nonlocal lowest
        for group, high, low in _by_score(batches, _ascending)():
            if len(high):
                lowest = min(lowest, _score(Border(int(high.min()), 0), descending=False))
            yield group, high, low

    def last_uncut(sizes: IntArray) -> IntArray:
        nonlocal rows, left
        rows = int(sizes[0])
        left = rows - rules.floor_of(rows, cutoff)
        return np.array([left - 1])

    [uncut] = _select(by_difficulty, last_uncut, groups=1, bits=32)
    kept = rules.count_of(rows, keep)
    made = StreamedCcs(rows, kept, seed, strata, uncut)
    if kept == left:
        return made
    if kept > left:
        [refilled] = _select(by_difficulty, lambda _: np.array([kept - 1]), groups=1, bits=32)
        return replace(made, refilled=refilled)
    highest = _score(uncut, descending=False)
    made = replace(made, low=lowest, high=highest)
    return replace(made, draws=_draws(batches, made))


def _draws(batches: Batches, made: StreamedCcs) -> tuple[tuple[Border, bool] | None, ...]:
    """Where the share of each stratum ends: at the first place that not all strata can fill."""
    rest = 0

    def keys() -> Iterator[tuple[IntArray, _U64, _U64]]:
        for ids, scores in batches():
            left = np.flatnonzero(~made.cut(ids, scores))
            own = ids[left]
            yield made.stratum(scores[left]), _draw(made.seed, own), _of_ids(own)

    def ranks(sizes: IntArray) -> IntArray:
        nonlocal rest
        place = _share(sizes, made.kept)
        rest = made.kept - int(np.minimum(sizes, place).sum())
        return np.where(sizes > place, place, -1)

    borders = _select(keys, ranks, groups=made.strata, bits=54)
    # The last, part-filled place goes to the smaller ids among the strata.
    taken = set(sorted(border.low for border in borders if border is not None)[:rest])
    return tuple(None if border is None else (border, border.low in taken) for border in borders)


def _share(sizes: IntArray, count: int) -> int:
    """The most rows that every stratum can give (or all it has) within `count` in all."""
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(sizes, middle).sum()) <= count:
            low = middle
        else:
            high = middle - 1
    return low


# -- keys ----------------------------------------------------------------------------------------


def _ascending(scores: FloatArray) -> _U64:
    """Numbers of 32 bits in the order of the scores (n,); -0 and 0 are one."""
    bits = (scores.astype(np.float32, copy=False) + np.float32(0.0)).view(np.uint32)
    turned = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    return turned.astype(np.uint64)


def _descending(scores: FloatArray) -> _U64:
    return np.uint64(2**32 - 1) - _ascending(scores)


def _score(border: Border | None, *, descending: bool) -> float:
    """The score behind a border's key; NaN where there is no border."""
    if border is None:
        return math.nan
    key = 2**32 - 1 - border.high if descending else border.high
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _of_ids(ids: IntArray) -> _U64:
    return ids.astype(np.uint64) ^ _SIGN


def _draw(seed: int, ids: IntArray) -> _U64:
    """Numbers of 54 bits in the reverse order of `rules.uniform`, equal where its are equal."""
    whole = np.floor(rules.uniform(seed, ids) * 2.0**53).astype(np.uint64)
    return np.uint64(2**53) - whole


def _by_score(batches: Batches, order: Callable[[FloatArray], _U64]) -> _Keys:
    def keys() -> Iterator[tuple[IntArray, _U64, _U64]]:
        for ids, scores in batches():
            bad = np.flatnonzero(~np.isfinite(scores))
            if bad.size:
                raise InputError(
                    f"scores must be finite; row {ids[bad[0]]} holds {scores[bad[0]]}. Repair or"
                    " reject that row before pruning."
                )
            yield np.zeros(len(ids), np.int64), order(scores), _of_ids(ids)

    return keys


# -- selection -----------------------------------------------------------------------------------


def _select(
    keys: _Keys, ranks: Callable[[IntArray], IntArray], *, groups: int, bits: int
) -> list[Border | None]:
    """The row of a rank in each group, in the order of (high, low) keys.

    `ranks` is told the rows of each group (G,) after the first pass and says which rank is
    sought in each, from 0; -1 for none. `bits` is how many of `high` are in use. With more
    groups than a pass can count apart, digits are shorter and passes more.
    """
    width = max(1, min(16, (_COUNTERS // groups).bit_length() - 1))
    known = np.zeros((2, groups), np.uint64)  # the digits found, of high and of low
    want = np.zeros(groups, np.int64)
    at = (0, bits)  # word and shift down to which digits are known
    for number, (word, shift, digits) in enumerate(_levels(bits, width)):
        counts = np.zeros((groups, 1 << digits), np.int64)
        for group, high, low in keys():
            if number:
                inside = _inside(group, high, low, known, at) & (want[group] >= 0)
                group, high, low = group[inside], high[inside], low[inside]
            digit = ((low if word else high) >> np.uint64(shift)).astype(np.int64)
            digit &= (1 << digits) - 1
            place = (group << digits) | digit
            counts += np.bincount(place, minlength=counts.size).reshape(counts.shape)
        if not number:
            want = ranks(counts.sum(axis=1)).astype(np.int64)
        active = np.flatnonzero(want >= 0)
        if not len(active):
            break
        running = np.cumsum(counts[active], axis=1)
        digit = (running <= want[active, None]).sum(axis=1)
        size = counts[active, digit]
        want[active] -= running[np.arange(len(active)), digit] - size
        known[word, active] |= digit.astype(np.uint64) << np.uint64(shift)
        at = (word, shift)
        if size.sum() <= _SORTED:
            _sort_rest(keys, known, want, at)
            break
    return [
        Border(int(known[0, group]), int(known[1, group])) if want[group] >= 0 else None
        for group in range(groups)
    ]


def _levels(bits: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(word, shift, digits) from the highest digit of `high` to the lowest of `low`."""
    for word, top in ((0, bits), (1, 64)):
        while top:
            digits = min(width, top)
            top -= digits
            yield word, top, digits


def _inside(group: IntArray, high: _U64, low: _U64, known: _U64, at: tuple[int, int]) -> BoolArray:
    """(n,) bool: rows whose digits are those known of their group, down to `at`."""
    word, shift = at
    down = np.uint64(shift)
    if not word:
        return np.asarray(high >> down == known[0][group] >> down, np.bool_)
    return np.asarray(
        (high == known[0][group]) & (low >> down == known[1][group] >> down), np.bool_
    )


def _sort_rest(keys: _Keys, known: _U64, want: IntArray, at: tuple[int, int]) -> None:
    """Gather the few rows left and put the one of the wanted rank into `known`."""
    parts: list[tuple[IntArray, _U64, _U64]] = []
    for group, high, low in keys():
        inside = _inside(group, high, low, known, at) & (want[group] >= 0)
        parts.append((group[inside], high[inside], low[inside]))
    group, high, low = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((low, high, group))
    for one in np.flatnonzero(want >= 0):
        row = order[np.searchsorted(group[order], one) + want[one]]
        known[0, one], known[1, one] = high[row], low[row]
