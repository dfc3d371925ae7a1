"""A model that is served: from a request's passages to their scores, beside other requests'."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import InputError, ModelError, PruneryError
from ..pruners.signals.context import Batching, Forward
from ..pruners.signals.context_blocks import not_finite
from .batching import Batcher
from .errors import Busy, TimedOut, TooLarge
from .fair_queue import Work
from .settings import Limits, Settings

if TYPE_CHECKING:
    from ..pruners.context import ContextPruner
    from ..pruners.context.pruner import PreparedPassages
    from ..pruners.context.result import ScoredPassage
    from ..pruners.models.config import ProvenceConfig
    from ..pruners.signals.context import Scorer
    from .metrics import ModelMetrics
    from .service import Service

Titles = Sequence[str | None] | Literal["first_sentence"] | None

WARM_UP_WORDS = (8, 60, 400)
"""Words of the passages that are scored before a model counts as ready."""
CPU_WIDTH_STEP = 16
"""oneDNN's caches hold megabytes for every shape; `benchmarks/service_memory.py` watches them."""
CPU_CELLS = 1024
"""Cells of a batch on a processor: as quick a token as twice as many, and a shorter wait."""
MOST_WORKERS = 8
"""Beyond so many the interpreter's lock, which each holds between operators, is what costs."""
MOST_TOLERANCE = 128
"""Padding tokens a row that a batch may have at most, however dear a forward pass is."""
SMALL = 64
"""Up to so many passages are laid out on the event loop itself: a thread would cost more."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the network said about one request's passages.

    Attributes
    ----------
    passages
        By place; an error in the place of a passage that has no score.
    tokens
        Of all blocks, with the question in each and without padding.
    blocks
        Rows that were run.
    tokenise_seconds, queue_seconds, inference_seconds
        Cutting and tokenising; waiting for the first batch; this request's share of its batches.
    """

    passages: list[ScoredPassage | PruneryError]
    tokens: int
    blocks: int
    tokenise_seconds: float
    queue_seconds: float
    inference_seconds: float


class ServedModel:
    """One model by its name in requests.

    Attributes
    ----------
    name, digest
        Its name here; SHA-256 of its weights.
    config
        The checkpoint's `ProvenceConfig`: threshold, aggregation, max_length, licence.
    """

    def __init__(
        self,
        name: str,
        pruner: ContextPruner,
        settings: Settings,
        metrics: ModelMetrics,
    ) -> None:
        self.name = name
        self.digest = pruner.digest
        self.config: ProvenceConfig = pruner.config
        self._pruner = pruner
        self._limits: Limits = settings.limits
        self._metrics = metrics
        self._preparing = 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix=f"prepare-{name}")
        scorer = pruner.scorer
        on_cpu = getattr(scorer.forward, "on_cpu", True)
        # ONNX Runtime has threads of its own, as many as torch would use.
        lone = not on_cpu or settings.backend == "onnx"
        workers, threads = (settings.workers or 1, None) if lone else fit_threads(settings.workers)
        wait = settings.batch_wait_seconds
        self.batcher = Batcher(
            scorer.forward,
            Batching(CPU_CELLS, scorer.batching.slack) if on_cpu else scorer.batching,
            workers=workers,
            torch_threads=threads,
            wait_seconds=(0.0 if on_cpu else 0.002) if wait is None else wait,
            queued_tokens=self._limits.queued_tokens,
            width_step=CPU_WIDTH_STEP if on_cpu else 1,
            observer=metrics,
            name=name,
        )

    @property
    def scorer(self) -> Scorer:
        """The network with its tokens, frame and batching."""
        return self._pruner.scorer

    @property
    def alive(self) -> bool:
        """Whether all threads of the model still run."""
        return self.batcher.alive

    async def score(
        self, question: str, passages: Sequence[str], *, titles: Titles = None
    ) -> Scores:
        """Score one question's passages; cancelling the call drops what has not run.

        Parameters
        ----------
        titles
            As in `ContextPruner.prune`.

        Raises
        ------
        InputError
            As `ContextPruner.prune` raises it.
        TooLarge
            More passages, characters or sentences than a request may have.
        Busy, TimedOut, Stopping
            Too much waits; no result within `Limits.seconds`; the service ends.
        ModelError
            The network failed on this request.
        """
        self.check_size(question, passages, titles)
        began = time.monotonic()
        deadline = began + self._limits.seconds
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._score(question, passages, titles, began, deadline)
        except TimeoutError:
            self._metrics.timed_out.inc()
            raise TimedOut(
                f"no result within {self._limits.seconds:g} seconds; the work was dropped."
                " Send fewer passages, or ask when less is going on."
            ) from None
        except Busy:
            self._metrics.refused.inc()
            raise

    async def _score(
        self, question: str, passages: Sequence[str], titles: Titles, began: float, deadline: float
    ) -> Scores:
        prepared = await self._prepare(question, passages, titles)
        ready = time.monotonic()
        work = await self._run(prepared, deadline)
        if len(passages) <= SMALL:
            made = _passages(prepared)
        else:
            made = await asyncio.to_thread(_passages, prepared)
        self._metrics.scored(len(made), sum(isinstance(one, PruneryError) for one in made))
        first = ready if work.first_run is None else work.first_run
        return Scores(
            passages=made,
            tokens=int(prepared.scores.lengths.sum()),
            blocks=len(prepared.scores.lengths),
            tokenise_seconds=ready - began,
            queue_seconds=max(0.0, first - ready),
            inference_seconds=work.inference_seconds,
        )

    async def _prepare(
        self, question: str, passages: Sequence[str], titles: Titles
    ) -> PreparedPassages:
        if self._preparing >= self._limits.waiting:
            raise Busy(
                f"{self._preparing} requests wait to be read already; {self._limits.waiting} may."
                " Ask again in a moment.",
                self.batcher.retry_after(),
            )
        self._preparing += 1
        given = titles if titles is None or isinstance(titles, str) else [titles]
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(
                self._pool,
                lambda: self._pruner.prepare([question], [passages], titles=given),
            )
        finally:
            self._preparing -= 1
        # Equal passages are scored once, but each has its sentences in the answer.
        count = int(np.diff(prepared.scores.packed.sentence_offset)[prepared.place].sum())
        if count > self._limits.sentences:
            raise TooLarge(
                f"the passages have {count} sentences; {self._limits.sentences} are allowed in"
                " one request. Send them in several."
            )
        return prepared

    async def _run(self, prepared: PreparedPassages, deadline: float) -> Work:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():
                ended.set_result(None)

        def done() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle)

        work = Work(prepared.scores, deadline, done)
        self.batcher.submit(work)
        try:
            await ended
        finally:
            if not ended.done() or ended.cancelled():
                self.batcher.drop(work)
        if work.error is not None:
            raise work.error
        return work

    def check_size(self, question: str, passages: Sequence[str], titles: Titles = None) -> None:
        """Raise TooLarge for more passages or characters than one request may have."""
        limits = self._limits
        if len(passages) > limits.passages:
            raise TooLarge(
                f"{len(passages)} passages; {limits.passages} are allowed in one request."
                " Send them in several."
            )
        named = () if titles is None or isinstance(titles, str) else titles
        characters = sum(map(len, passages)) + sum(len(title or "") for title in named)
        if characters > limits.characters:
            raise TooLarge(
                f"passages and titles have {characters} characters; {limits.characters} are"
                " allowed in one request. Send them in several."
            )
        asked = max(1, limits.characters // 100)
        if len(question) > asked:
            raise TooLarge(f"the question has {len(question)} characters; {asked} are allowed.")

    def warm_up(self) -> None:
        """Score passages of a few lengths, so that the first request finds everything loaded.

        Raises ModelError where the network gives no numbers.
        """
        passages = [" ".join(["word"] * count) + "." for count in WARM_UP_WORDS]
        for _ in range(2):
            self._pruner.prune("what is asked", passages)
        length = min(128, self.config.max_length)
        self.batcher.tolerate(tolerance(self._pruner.scorer.forward, length))

    def close(self) -> None:
        """Fail what waits, end the threads."""
        self.batcher.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def fit_threads(workers: int | None) -> tuple[int, int]:
    """Batch workers on a processor, and torch threads of each.

    One thread a worker unless told otherwise: threads within an operator wait for each other,
    all the longer where something else runs as well; workers do not.
    """
    import torch

    cores = torch.get_num_threads()
    used = workers or min(cores, MOST_WORKERS)
    return used, max(1, cores // used)


def tolerance(forward: Forward, length: int) -> int:
    """Tokens that a network reads in the time that a forward pass costs whatever it reads.

    From two timings, of one short row and of four of `length` tokens; 0 to `MOST_TOLERANCE`.
    """
    short = min(8, length - 1)
    one, four = _seconds(forward, 1, short), _seconds(forward, 4, length)
    a_token = (four - one) / (4 * length - short)
    if a_token <= 0:
        return MOST_TOLERANCE
    return int(min(MOST_TOLERANCE, max(0.0, one - a_token * short) / a_token))


def _seconds(forward: Forward, rows: int, length: int) -> float:
    ids, types = np.zeros((2, rows, length), np.int64)
    mask = np.ones_like(ids)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        forward(ids, mask, types)
        best = min(best, time.perf_counter() - began)
    return best


def _passages(prepared: PreparedPassages) -> list[ScoredPassage | PruneryError]:
    return [not_finite() if one is None else one for one in prepared.finite_passages()]


class Loading:
    """Models on their way; `error` says why one did not load."""

    def __init__(self) -> None:
        self.error: PruneryError | None = None
        self.finished = threading.Event()


def load_models(service: Service, pruners: Mapping[str, ContextPruner]) -> Loading:
    """Load and warm up all models in a thread; `service.state` says when that is done."""
    loading = Loading()
    unknown = set(pruners) - set(service.settings.models)
    if unknown:
        raise InputError(f"models {sorted(unknown)} are given but not in the settings' `models`.")

    def load() -> None:
        try:
            for name in service.settings.models:
                if loading.finished.is_set():
                    return
                service.models[name] = _load_one(service, name, pruners.get(name))
            if service.state == "starting":
                service.state = "ready"
        except PruneryError as error:
            loading.error = error
        except Exception as error:  # noqa: BLE001  a process that can serve nothing says why
            loading.error = ModelError(f"{type(error).__name__}: {error}")
        finally:
            loading.finished.set()

    # A daemon: a load from a slow disk must not keep a stopped process alive.
    threading.Thread(target=load, name="load-models", daemon=True).start()
    return loading


def _load_one(service: Service, name: str, pruner: ContextPruner | None) -> ServedModel:
    from ..pruners.context import ContextPruner

    settings = service.settings
    began = time.monotonic()
    if pruner is None:
        pruner = ContextPruner.from_pretrained(
            settings.models[name],
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,  # type: ignore[arg-type]  # refused by name inside
        )
    metrics = service.metrics.of_model(name)
    served = ServedModel(name, pruner, settings, metrics)
    try:
        served.warm_up()
    except BaseException:
        served.close()
        raise
    metrics.load_seconds.set(time.monotonic() - began)
    return served


async def close_models(service: Service, loading: Loading) -> None:
    """End loading and all models."""
    service.state = "draining"
    loading.finished.set()
    for served in list(service.models.values()):
        await asyncio.to_thread(served.close)
