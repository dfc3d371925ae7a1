"""Blocks of many requests in shared forward passes.

One `Batcher` a model: requests put their packed blocks in, worker threads take blocks of like
length, of whichever request, and run them together. Order is start-time fair queuing on tokens
(Goyal, Vin and Cheng, 1996): a block's tag is the virtual time at which its request could have
started it had all requests in the queue shared the model evenly, and the lowest tag goes first;
a request of three passages overtakes one of a thousand.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import ModelError, PruneryError
from ..pruners.signals.context import Batching, Forward
from ..pruners.signals.context_blocks import BlockScores, batch_arrays
from .errors import Busy, Stopping

RATE_MEMORY = 0.9
"""Weight of the past in the running rate, a batch."""
LEAST_CELLS = 256
"""Idle workers share out what is queued, but not below so many tokens a batch."""


class Observer(Protocol):
    """Who is told about batches and the queue (`metrics.ModelMetrics`)."""

    def batch(self, rows: int, tokens: int, cells: int, seconds: float) -> None:
        """A batch was run: rows, tokens without padding, cells with it."""

    def queue(self, requests: int, tokens: int) -> None:
        """What is waiting now."""


@dataclass(eq=False, slots=True)
class Work:
    """The blocks of one request, from `Batcher.submit` until `done` is called.

    Attributes
    ----------
    scores
        Filled in by the workers.
    deadline
        `time.monotonic()` past which no block of it is run.
    done
        Called once, from a worker's thread, when all blocks are in or the request failed.
    error
        Why it failed.
    entered, first_run, inference_seconds
        When it came and when its first block ran (`time.monotonic()`); its share, by tokens, of
        the time of its batches.
    """

    scores: BlockScores
    deadline: float
    done: Callable[[], None]
    error: PruneryError | None = None
    entered: float = field(default_factory=time.monotonic)
    first_run: float | None = None
    inference_seconds: float = 0.0
    waiting_tokens: int = 0
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Entry(NamedTuple):
    """A block in the queue; entries compare by tag, then by arrival."""

    tag: float
    number: int
    work: Work
    block: int
    length: int


class Batcher:
    """The queue of one model and the threads that run it.

    Parameters
    ----------
    forward
        The network; called from several threads at once.
    batching
        Cells of a batch, and how unlike lengths in it may be.
    workers, torch_threads
        Threads that run batches, and threads that each one's operators may use (None leaves it).
    wait_seconds
        How long a batch that is not full may wait for more.
    queued_tokens
        Tokens that may wait; see `submit`.
    tolerance
        Padding tokens a row that cost no more than a forward pass of its own: where a length
        alone does not fill a batch, rows shorter by so many join it.
    """

    def __init__(
        self,
        forward: Forward,
        batching: Batching,
        *,
        workers: int = 1,
        torch_threads: int | None = None,
        wait_seconds: float = 0.0,
        queued_tokens: int = 1_000_000,
        tolerance: int = 0,
        observer: Observer | None = None,
        name: str = "model",
    ) -> None:
        self._forward = forward
        self._batching = batching
        self._torch_threads = torch_threads
        self._wait = wait_seconds
        self._limit = queued_tokens
        self.tolerance = tolerance
        self._observer = observer
        self._base = math.log(1.0 / (1.0 - min(batching.slack, 0.9))) if batching.slack else 0.01
        self._ready = threading.Condition()
        self._heaps: dict[int, list[Entry]] = {}
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._live: dict[int, Work] = {}
        self._tokens = 0
        self._rate = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"batch-{name}-{i}", daemon=True)
            for i in range(max(1, workers))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether every worker still runs."""
        return self._closed or all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests and tokens in the queue."""
        with self._ready:
            return len(self._live), self._tokens

    @property
    def tokens_per_second(self) -> float:
        """Running mean of all workers together while they are at work; 0 before the first batch."""
        return self._rate * len(self._threads)

    def retry_after(self) -> float:
        """Seconds until what is queued now will have been run."""
        rate = self.tokens_per_second
        return self._tokens / rate if rate else 1.0

    def submit(self, work: Work) -> None:
        """Queue a request's blocks.

        Raises
        ------
        Busy
            More than `queued_tokens` would wait. A request larger than that goes in alone.
        Stopping
            The batcher is closed.
        """
        lengths = work.scores.lengths
        total = int(lengths.sum())
        if not total:
            work.done()
            return
        with self._ready:
            if self._closed:
                raise Stopping("the service is stopping; ask another instance.")
            if self._tokens and self._tokens + total > self._limit:
                raise Busy(
                    f"{self._tokens} tokens wait for the model already, and this request has"
                    f" {total}; {self._limit} may wait. Ask again in a moment.",
                    self.retry_after(),
                )
            self._put(work, lengths, total)
            self._ready.notify(min(len(lengths), len(self._threads)))
        self._report()

    def _put(self, work: Work, lengths: np.ndarray, total: int) -> None:
        order = np.argsort(-lengths, kind="stable")
        sizes = lengths[order]
        tags = self._virtual + np.cumsum(sizes) - sizes
        for tag, block, length in zip(tags.tolist(), order.tolist(), sizes.tolist(), strict=True):
            entry = Entry(tag, next(self._numbers), work, block, length)
            heapq.heappush(self._heaps.setdefault(self._bucket(length), []), entry)
        work.waiting_tokens = total
        self._tokens += total
        self._live[id(work)] = work

    def _bucket(self, length: int) -> int:
        return int(math.log(length) / self._base)

    def drop(self, work: Work) -> None:
        """Take a request out: none of its blocks that has not started will run."""
        with self._ready:
            work.gone = True
            self._forget(work)
            self._compact()
        self._report()

    def _forget(self, work: Work) -> None:
        if self._live.pop(id(work), None) is not None:
            self._tokens -= work.waiting_tokens
            work.waiting_tokens = 0

    def _compact(self) -> None:
        """Dead entries go once they outnumber the living (which have at least one token each)."""
        if sum(map(len, self._heaps.values())) <= 2 * self._tokens + 1000 and self._live:
            return
        for bucket, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if not entry.work.gone]
            heapq.heapify(kept)
            self._heaps[bucket] = kept
            if not kept:
                del self._heaps[bucket]

    def close(self, *, join_seconds: float = 5.0) -> None:
        """Fail what waits with Stopping, and end the threads after the batch they are in."""
        with self._ready:
            self._closed = True
            left = list(self._live.values())
            for work in left:
                work.gone = True
                self._forget(work)
            self._heaps.clear()
            self._ready.notify_all()
        for work in left:
            self._end(work, Stopping("the service stopped before this request was answered."))
        ends = time.monotonic() + join_seconds
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    # What follows runs in the workers' threads.

    def _loop(self) -> None:
        if self._torch_threads is not None:
            import torch

            torch.set_num_threads(self._torch_threads)
        while (batch := self._take()) is not None:
            self._run(batch)
            self._report()

    def _take(self) -> list[Entry] | None:
        """The next batch; waits for one. None once closed."""
        with self._ready:
            while not self._closed:
                first = self._first()
                if first is None:
                    self._ready.wait()
                    continue
                wait = first.work.entered + self._wait - time.monotonic()
                if wait > 0 and self._tokens < self._batching.tokens:
                    self._ready.wait(wait)
                    continue
                self._virtual = max(self._virtual, first.tag)
                return self._collect(first)
        return None

    def _first(self) -> Entry | None:
        """The living entry of the lowest tag; dead ones before it are thrown away."""
        now = time.monotonic()
        best: Entry | None = None
        for bucket, heap in list(self._heaps.items()):
            while heap and not self._living(heap[0].work, now):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[bucket]
            elif best is None or heap[0] < best:
                best = heap[0]
        return best

    def _living(self, work: Work, now: float) -> bool:
        if not work.gone and now > work.deadline:
            work.gone = True  # the request itself finds out by its own clock
            self._forget(work)
        return not work.gone

    def _collect(self, first: Entry) -> list[Entry]:
        """Blocks like `first` in length, lowest tags first, up to a batch's cells."""
        share = max(LEAST_CELLS, -(-self._tokens // len(self._threads)))
        cells = min(self._batching.tokens, share)
        batch: list[Entry] = []
        width = self._draw(self._bucket(first.length), batch, 0, cells)
        if (len(batch) + 1) * width <= cells and self.tolerance:
            for bucket in self._near(first.length, width):
                width = self._draw(bucket, batch, width, cells)
        return batch

    def _near(self, length: int, width: int) -> list[int]:
        """Other lengths that may join, the nearest first."""
        own = self._bucket(length)
        low = self._bucket(max(1, width - self.tolerance))
        high = self._bucket(length + self.tolerance)
        near = [b for b in self._heaps if low <= b <= high and b != own]
        return sorted(near, key=lambda b: (abs(b - own), b))

    def _draw(self, bucket: int, batch: list[Entry], width: int, cells: int) -> int:
        """Move entries of a bucket into the batch while they fit; returns the new width."""
        heap = self._heaps.get(bucket, [])
        now = time.monotonic()
        while heap:
            entry = heap[0]
            if not self._living(entry.work, now):
                heapq.heappop(heap)
                continue
            wide = max(width, entry.length)
            shortest = min([entry.length, *(one.length for one in batch)])
            fits = (len(batch) + 1) * wide <= cells
            alike = wide - shortest <= max(self.tolerance, wide * self._batching.slack)
            if batch and not (fits and alike):
                break
            heapq.heappop(heap)
            entry.work.waiting_tokens -= entry.length
            self._tokens -= entry.length
            batch.append(entry)
            width = wide
        if not heap:
            self._heaps.pop(bucket, None)
        return width

    def _run(self, batch: list[Entry]) -> None:
        """Run one batch; if it fails, each request in it once alone, to find whose fault it is."""
        try:
            self._forward_batch(batch)
        except Exception as error:  # noqa: BLE001  the model goes on for everybody else
            works = {id(entry.work): entry.work for entry in batch}
            if len(works) == 1:
                self._fail(batch[0].work, error)
                return
            for work in works.values():
                own = [entry for entry in batch if entry.work is work]
                try:
                    self._forward_batch(own)
                except Exception as again:  # noqa: BLE001
                    self._fail(work, again)

    def _fail(self, work: Work, error: Exception) -> None:
        with self._ready:
            work.gone = True
            self._forget(work)
        if not isinstance(error, PruneryError):
            reason = f"{type(error).__name__}: {error}"
            error = ModelError(f"the network failed on this request: {reason:.300}")
        self._end(work, error)

    def _forward_batch(self, batch: list[Entry]) -> None:
        began = time.monotonic()
        width = max(entry.length for entry in batch)
        blocks = [(entry.work.scores.packed, entry.block) for entry in batch]
        rank, keep = self._forward(*batch_arrays(blocks, width))
        ranks = rank.tolist()
        took = time.monotonic() - began
        tokens = sum(entry.length for entry in batch)
        for row, entry in enumerate(batch):
            work = entry.work
            with work.lock:
                work.scores.put(entry.block, ranks[row], keep[row])
                if work.first_run is None:
                    work.first_run = began
                work.inference_seconds += took * entry.length / tokens
                whole = work.scores.left == 0
            if whole:
                with self._ready:
                    self._forget(work)
                self._end(work, None)
        self._measure(tokens, took)
        if self._observer is not None:
            self._observer.batch(len(batch), tokens, len(batch) * width, took)

    def _end(self, work: Work, error: PruneryError | None) -> None:
        work.error = error
        work.done()

    def _measure(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if not self._rate else RATE_MEMORY * self._rate + 0.1 * rate

    def _report(self) -> None:
        if self._observer is not None:
            self._observer.queue(len(self._live), self._tokens)
