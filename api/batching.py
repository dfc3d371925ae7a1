"""Blocks of many requests in shared forward passes: the threads around a `FairQueue`."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from ..errors import ModelError, PruneryError
from ..pruners.signals.context import Batching, Forward
from ..pruners.signals.context_blocks import batch_arrays
from .errors import Busy, Stopping
from .fair_queue import Entry, FairQueue, Work

RATE_MEMORY = 0.9
"""Weight of the past in the running rate, a batch."""
LEAST_CELLS = 128
"""Idle workers share out what is queued, but not below so many tokens a batch."""


class Observer(Protocol):
    """Who is told about batches and the queue (`metrics.ModelMetrics`)."""

    def batch(self, rows: int, tokens: int, cells: int, seconds: float) -> None:
        """A batch was run: rows, tokens without padding, cells with it."""

    def queue(self, requests: int, tokens: int) -> None:
        """What is waiting now."""


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
    width_step
        Batches are as wide as a multiple of it: libraries keep code and buffers for every shape
        that they have seen, so fewer shapes keep memory flat.
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
        width_step: int = 1,
        observer: Observer | None = None,
        name: str = "model",
    ) -> None:
        self._forward = forward
        self._cells = batching.tokens
        self._torch_threads = torch_threads
        self._wait = wait_seconds
        self._limit = queued_tokens
        self._width_step = width_step
        self._observer = observer
        self._changed = threading.Condition()
        self._queue = FairQueue(batching.slack)
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
        """Whether every worker still runs, or was asked to end."""
        return self._closed or all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests of which not all blocks are in, and tokens in the queue."""
        with self._changed:
            return self._queue.requests, self._queue.tokens

    def tolerate(self, tokens: int) -> None:
        """Set the queue's `tolerance`, which is measured once the network is warm."""
        with self._changed:
            self._queue.tolerance = tokens

    def retry_after(self) -> float:
        """Seconds until what is queued now will have been run, by the rate of late."""
        rate = self._rate * len(self._threads)
        return self._queue.tokens / rate if rate else 1.0

    def submit(self, work: Work) -> None:
        """Queue a request's blocks.

        Raises
        ------
        Busy
            More than `queued_tokens` would wait. An empty queue takes a request of any size.
        Stopping
            The batcher is closed.
        """
        blocks, total = len(work.scores.lengths), int(work.scores.lengths.sum())
        if not blocks:
            work.done()
            return
        with self._changed:
            if self._closed:
                raise Stopping("the service is stopping; ask another instance.")
            waits = self._queue.tokens
            if waits and waits + total > self._limit:
                raise Busy(
                    f"{waits} tokens wait for the model already, and this request has {total};"
                    f" {self._limit} may wait. Ask again in a moment.",
                    self.retry_after(),
                )
            self._queue.put(work)
            self._changed.notify(min(blocks, len(self._threads)))
        self._report()

    def drop(self, work: Work) -> None:
        """Take a request out: none of its blocks that has not started will run."""
        with self._changed:
            self._queue.forget(work)
        self._report()

    def close(self, *, join_seconds: float = 5.0) -> None:
        """Fail what waits with Stopping, and end the threads after the batch they are in."""
        with self._changed:
            self._closed = True
            left = self._queue.clear()
            self._changed.notify_all()
        for work in left:
            work.error = Stopping("the service stopped before this request was answered.")
            work.done()
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
        with self._changed:
            while not self._closed:
                first = self._queue.first()
                if first is None:
                    self._changed.wait()
                    continue
                wait = first.work.entered + self._wait - time.monotonic()
                if wait > 0 and self._queue.tokens < self._cells:
                    self._changed.wait(wait)
                    continue
                share = -(-self._queue.tokens // len(self._threads))
                return self._queue.draw(first, min(self._cells, max(LEAST_CELLS, share)))
        return None

    def _run(self, batch: list[Entry]) -> None:
        """Run one batch; if it fails, each request in it once alone, to find whose fault it is."""
        try:
            self._score(batch)
        except Exception as error:  # noqa: BLE001  the model goes on for everybody else
            works = {id(entry.work): entry.work for entry in batch}
            if len(works) == 1:
                self._fail(batch[0].work, error)
                return
            for work in works.values():
                try:
                    self._score([entry for entry in batch if entry.work is work])
                except Exception as again:  # noqa: BLE001
                    self._fail(work, again)

    def _fail(self, work: Work, error: Exception) -> None:
        if not isinstance(error, PruneryError):
            reason = f"{type(error).__name__}: {error}"
            error = ModelError(f"the network failed on this request: {reason:.300}")
        self._end(work, error)

    def _width(self, batch: list[Entry]) -> int:
        longest = max(entry.length for entry in batch)
        stepped = -(-longest // self._width_step) * self._width_step
        # Not beyond the positions that the network has.
        return min(stepped, batch[0].work.scores.packed.frame.max_length)

    def _score(self, batch: list[Entry]) -> None:
        began = time.monotonic()
        width = self._width(batch)
        blocks = [(entry.work.scores.packed, entry.block) for entry in batch]
        rank, keep = self._forward(*batch_arrays(blocks, width))
        took = time.monotonic() - began
        tokens = sum(entry.length for entry in batch)
        for row, (entry, logit) in enumerate(zip(batch, rank.tolist(), strict=True)):
            work = entry.work
            with work.lock:
                work.scores.put(entry.block, logit, keep[row])
                work.first_run = began if work.first_run is None else work.first_run
                work.inference_seconds += took * entry.length / tokens
                whole = work.scores.left == 0
            if whole:
                self._end(work, None)
        rate = tokens / max(took, 1e-6)
        self._rate += (rate - self._rate) * (1.0 - RATE_MEMORY if self._rate else 1.0)
        if self._observer is not None:
            self._observer.batch(len(batch), tokens, len(batch) * width, took)

    def _end(self, work: Work, error: PruneryError | None) -> None:
        with self._changed:
            over = work.gone
            self._queue.forget(work)
            work.gone = True
        if not over:
            work.error = error
            work.done()

    def _report(self) -> None:
        if self._observer is not None:
            self._observer.queue(self._queue.requests, self._queue.tokens)
