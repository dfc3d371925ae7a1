"""Which blocks run next: start-time fair queuing on tokens, in batches of like length.

A block's tag is the virtual time at which its request could have started it, had all requests in
the queue shared the model evenly (Goyal, Vin and Cheng, 1996); the lowest tag goes first, so a
request of three passages overtakes one of a thousand. Blocks of like length that wait as well
fill the batch. Nothing here locks or waits; see `batching`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import PruneryError
from ..pruners.signals.context_blocks import BlockScores

SPARE_ENTRIES = 1000
"""Entries of dropped requests that may stay in the queue beside as many living ones."""


@dataclass(eq=False, slots=True)
class Work:
    """The blocks of one request.

    Attributes
    ----------
    scores
        Filled in by the workers; `lock` is held for it.
    deadline
        `time.monotonic()` past which no block of it is run.
    done
        Called once, from a worker's thread, when all blocks are in or the request failed.
    error
        Why it failed.
    entered, first_run, inference_seconds
        When it came and when its first block ran (`time.monotonic()`); its share, by tokens, of
        the time of its batches.
    tokens, blocks
        Waiting in the queue.
    gone
        Dropped, failed or past its deadline: no further block of it is run.
    """

    scores: BlockScores
    deadline: float
    done: Callable[[], None]
    error: PruneryError | None = None
    entered: float = field(default_factory=time.monotonic)
    first_run: float | None = None
    inference_seconds: float = 0.0
    tokens: int = 0
    blocks: int = 0
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Entry(NamedTuple):
    """A block in the queue; entries compare by tag, then by arrival."""

    tag: float
    number: int
    work: Work
    block: int
    length: int


@dataclass(slots=True)
class _Batch:
    """Entries drawn so far, and the range of their lengths."""

    cells: int
    entries: list[Entry] = field(default_factory=list)
    shortest: int = 0
    width: int = 0

    def takes(self, length: int, slack: float, tolerance: int) -> bool:
        """Whether a row of that length still fits, and is like the others."""
        if not self.entries:
            return True
        wide, short = max(self.width, length), min(self.shortest, length)
        fits = (len(self.entries) + 1) * wide <= self.cells
        return fits and wide - short <= max(tolerance, wide * slack)

    def add(self, entry: Entry) -> None:
        self.shortest = min(self.shortest, entry.length) if self.entries else entry.length
        self.width = max(self.width, entry.length)
        self.entries.append(entry)

    @property
    def full(self) -> bool:
        return (len(self.entries) + 1) * self.width > self.cells


class FairQueue:
    """Blocks of all requests of one model.

    Parameters
    ----------
    slack
        Share of a row that may be padding; lengths within it are alike.
    tolerance
        Padding tokens a row that cost no more than a forward pass of its own: where like
        lengths do not fill a batch, rows that differ by so many join it.

    Attributes
    ----------
    tokens
        Waiting, without padding.
    """

    def __init__(self, slack: float, tolerance: int = 0) -> None:
        self.tolerance = tolerance
        self.tokens = 0
        self._slack = slack
        self._base = -math.log1p(-min(max(slack, 0.01), 0.9))
        self._heaps: dict[int, list[Entry]] = {}
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._live: dict[int, Work] = {}
        self._entries = 0
        self._blocks = 0  # of living requests

    @property
    def requests(self) -> int:
        """Requests of which not all blocks are in yet."""
        return len(self._live)

    def put(self, work: Work) -> None:
        """Queue a request's blocks, longest first."""
        lengths = work.scores.lengths
        order = np.argsort(-lengths, kind="stable")
        sizes = lengths[order]
        tags = self._virtual + np.cumsum(sizes) - sizes
        for tag, block, length in zip(tags.tolist(), order.tolist(), sizes.tolist(), strict=True):
            entry = Entry(tag, next(self._numbers), work, block, length)
            heapq.heappush(self._heaps.setdefault(self._bucket(length), []), entry)
        work.tokens, work.blocks = int(lengths.sum()), len(lengths)
        self.tokens += work.tokens
        self._entries += work.blocks
        self._blocks += work.blocks
        self._live[id(work)] = work

    def forget(self, work: Work) -> None:
        """The request has ended, well or not: none of its blocks that still waits will run."""
        if self._live.pop(id(work), None) is None:
            return
        work.gone = True
        self.tokens -= work.tokens
        self._blocks -= work.blocks
        work.tokens = work.blocks = 0
        if self._entries > 2 * self._blocks + SPARE_ENTRIES:
            self._sweep()

    def clear(self) -> list[Work]:
        """Empty the queue; returns the requests that were in it."""
        left = list(self._live.values())
        for work in left:
            self.forget(work)
        self._sweep()
        return left

    def first(self) -> Entry | None:
        """The block that is due: the living one of the lowest tag."""
        now = time.monotonic()
        heads = (self._head(bucket, now) for bucket in list(self._heaps))
        return min((head for head in heads if head is not None), default=None)

    def draw(self, first: Entry, cells: int) -> list[Entry]:
        """Take out `first` and others like it, lowest tags first, into `cells` with padding."""
        self._virtual = max(self._virtual, first.tag)
        batch = _Batch(cells)
        own = self._bucket(first.length)
        now = time.monotonic()
        self._fill(batch, own, now)
        if self.tolerance:
            low = self._bucket(max(1, first.length - self.tolerance))
            high = self._bucket(first.length + self.tolerance)
            near = [b for b in self._heaps if low <= b <= high and b != own]
            for bucket in sorted(near, key=lambda b: (abs(b - own), b)):
                if batch.full:
                    break
                self._fill(batch, bucket, now)
        return batch.entries

    def _bucket(self, length: int) -> int:
        return int(math.log(length) / self._base)

    def _head(self, bucket: int, now: float) -> Entry | None:
        """The first living entry of a bucket; dead ones before it are thrown away."""
        heap = self._heaps.get(bucket)
        while heap:
            work = heap[0].work
            if not work.gone and now > work.deadline:
                self.forget(work)  # the request itself finds out by its own clock
                heap = self._heaps.get(bucket)
                continue
            if not work.gone:
                return heap[0]
            heapq.heappop(heap)
            self._entries -= 1
        self._heaps.pop(bucket, None)
        return None

    def _fill(self, batch: _Batch, bucket: int, now: float) -> None:
        while (entry := self._head(bucket, now)) is not None:
            if not batch.takes(entry.length, self._slack, self.tolerance):
                return
            heapq.heappop(self._heaps[bucket])
            work = entry.work
            work.tokens -= entry.length
            work.blocks -= 1
            self.tokens -= entry.length
            self._entries -= 1
            self._blocks -= 1
            batch.add(entry)

    def _sweep(self) -> None:
        """Throw dead entries away, with all that their requests hold."""
        for bucket, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if not entry.work.gone]
            if kept:
                heapq.heapify(kept)
                self._heaps[bucket] = kept
            else:
                del self._heaps[bucket]
        self._entries = sum(map(len, self._heaps.values()))
