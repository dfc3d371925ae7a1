"""Who makes the shards of a step: processes of this machine, or actors on Ray."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import InputError, PruneryError
from . import engine

if TYPE_CHECKING:
    from .engine import Job, WorkerPool
    from .progress import Progress

Engine = Literal["processes", "ray"]


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers share the shards of a step, of which kind; none of it changes a row.

    Attributes
    ----------
    engine
        `processes` on this machine, or `ray`.
    count
        Processes, or actors.
    threads
        That each gives to its models; None leaves the libraries' own default.
    ray_address
        Of a Ray cluster, or `auto`; None starts one on this machine, for as long as it is used.
    gpus
        That each Ray actor asks for; a share of one lets several actors share it.
    """

    engine: Engine = "processes"
    count: int = 1
    threads: int | None = None
    ray_address: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise InputError(
                f"expected an engine among {', '.join(get_args(Engine))}; found `{self.engine}`."
            )
        if self.count < 1 or self.gpus < 0:
            raise InputError(
                f"expected at least one worker and no less than 0 GPUs; found {self.count} workers"
                f" and {self.gpus:g} GPUs."
            )
        if self.engine != "ray" and (self.ray_address is not None or self.gpus):
            raise InputError(
                "a Ray address and GPUs of a worker mean something only to the engine `ray`. Add"
                " --engine ray, or leave them out."
            )

    def open(self) -> AbstractContextManager[WorkerPool]:
        """A pool of these workers, to be used as a context manager; nothing starts before use."""
        if self.engine == "processes":
            return ProcessPool(self.count, self.threads)
        from .ray_pool import RayPool

        return RayPool(self.count, self.threads, address=self.ray_address, gpus=self.gpus)


class ProcessPool:
    """Processes that share the shards of one step after another, started when first needed.

    A worker keeps its models between steps. Use it as a context manager.
    """

    def __init__(self, workers: int, threads: int | None = None) -> None:
        self.workers = workers
        # One worker, or one shard, is done sooner where we are.
        self.least = 2 if workers > 1 else None
        self._threads = threads
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def run(self, job: Job, pending: list[int], progress: Progress) -> None:
        """Make those shards; the first failure stops the rest."""
        if self._pool is None:
            # spawn: a forked child of a process with OpenMP or gRPC threads can hang.
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_limit_threads,
                initargs=(self._threads,),
            )
        under_way: set[Future[int]] = set()
        try:
            for future in self._finished(job, pending, under_way):
                future.result()
                progress.advance()
        except BrokenProcessPool as error:
            self._pool = None
            raise PruneryError(
                f"a worker process of step `{job.step}` died (killed, or out of memory). The"
                " shards that were done are kept: run again, with fewer workers if memory was"
                " short."
            ) from error
        finally:
            for future in under_way:
                future.cancel()

    def _finished(
        self, job: Job, pending: list[int], under_way: set[Future[int]]
    ) -> Iterator[Future[int]]:
        """Futures as they finish, with few more under way than there are workers."""
        assert self._pool is not None
        left = iter(pending)
        while True:
            # Waiting on all shards at once would cost time for each of them at every step.
            while len(under_way) < 2 * self.workers and (shard := next(left, None)) is not None:
                under_way.add(self._pool.submit(engine.run_shard, job, shard))
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            under_way -= done
            yield from done


def _limit_threads(threads: int | None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
