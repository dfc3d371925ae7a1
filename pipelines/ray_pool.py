"""Shards on Ray: actors on one machine or many make them, and keep their models between them.

Ray sees a job and a number; what an actor makes goes to the store, not through Ray. So a dead
actor or node loses only the shard it was at, which another actor makes again. All nodes must see
the store (a shared folder, or s3://) and have prunery and the models installed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from ..errors import PruneryError, StoreError
from . import engine

if TYPE_CHECKING:
    from .engine import Job
    from .progress import Progress

RETRIES = 3
"""How often the actor may die under one shard before the run stops."""
START_SECONDS = 300.0
"""How long none of the actors may be there before the run stops."""
# What decides how a model computes, or whether it may be looked for on the network.
_PASSED_ON = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "PRUNERY_CACHE")


class _Worker:
    """What runs inside an actor."""

    def __init__(self, environment: dict[str, str | None]) -> None:
        # Ray gives an actor one OpenMP thread unless told; models are not loaded yet.
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def ready(self) -> int:
        """Say that it is there: its process id."""
        return os.getpid()

    def run(self, job: Job, shard: int) -> int:
        """Make one shard."""
        return engine.run_shard(job, shard)


class RayPool:
    """Actors that share the shards of one step after another, started when first needed.

    Parameters
    ----------
    workers
        Actors; those that the cluster has no room for yet join when it has.
    threads
        That each gives to its models, and CPUs that it asks the cluster for (one where None).
    address
        Of a cluster, or `auto`; None starts one here and stops it on leaving. A cluster that
        this process is connected to already is used as it is.
    gpus
        That each actor asks for.
    """

    least: int | None = 1

    def __init__(
        self,
        workers: int,
        threads: int | None = None,
        *,
        address: str | None = None,
        gpus: float = 0.0,
    ) -> None:
        self.workers = workers
        self._threads = threads
        self._address = address
        self._gpus = gpus
        self._started = False
        self._ready: list[Any] = []
        self._coming: dict[Any, Any] = {}  # what says that an actor is there -> the actor

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._ready and not self._coming and not self._started:
            return
        ray = _ray()
        if ray.is_initialized():
            for actor in [*self._ready, *self._coming.values()]:
                ray.kill(actor)
            if self._started:
                ray.shutdown()
        self._ready, self._coming, self._started = [], {}, False

    def run(self, job: Job, pending: list[int], progress: Progress) -> None:
        """Make those shards; the first failure of a step stops the rest.

        Raises
        ------
        PruneryError
            No Ray is installed or reached, no actor can start, or actors died `RETRIES` times
            under one shard. Finished shards are kept.
        """
        ray = _ray()
        self._connect(ray)
        dispatch = _Dispatch(self, ray, job, pending)
        try:
            dispatch(progress)
        except ray.exceptions.RayError as error:
            raise PruneryError(
                f"Ray failed in step `{job.step}`: {error}. The shards that were done are kept:"
                " look at the cluster (`ray status`) and run again."
            ) from error
        finally:
            # An actor that is still at a shard would go on writing: it is stopped with the run.
            for actor in dispatch.busy():
                ray.kill(actor)

    # -- actors --------------------------------------------------------------------------------

    def _connect(self, ray: Any) -> None:
        if ray.is_initialized():
            return
        local = {} if self._address else {"num_cpus": self.workers * (self._threads or 1)}
        if not self._address and self._gpus:
            local["num_gpus"] = _gpus_here()
        if not self._address:
            local["include_dashboard"] = False
        try:
            _knock(self._address)
            ray.init(
                address=self._address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except (OSError, RuntimeError, ValueError) as error:
            where = f"at `{self._address}`" if self._address else "on this machine"
            raise PruneryError(
                f"expected a Ray cluster {where}; found none that answers: {error}. Start one"
                " (`ray start --head`), give its address, or leave --ray-address out to start one"
                " on this machine."
            ) from error
        self._started = True

    def grow(self, ray: Any) -> None:
        """Ask for actors until there are `workers` of them, those that are coming included."""
        made = ray.remote(
            num_cpus=self._threads or 1,
            num_gpus=self._gpus,
            max_restarts=0,  # a shard of a dead actor is given to another one here
            max_task_retries=0,
        )(_Worker)
        environment: dict[str, str | None] = {name: os.environ.get(name) for name in _PASSED_ON}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        while len(self._ready) + len(self._coming) < self.workers:
            actor = made.remote(environment)
            self._coming[actor.ready.remote()] = actor

    def arrived(self, signal: Any) -> Any:
        """The actor that has said it is there."""
        actor = self._coming.pop(signal)
        self._ready.append(actor)
        return actor

    def lost(self, actor: Any) -> None:
        """Forget an actor that died."""
        if actor in self._ready:
            self._ready.remove(actor)

    @property
    def ready(self) -> list[Any]:
        """Actors that are there."""
        return list(self._ready)

    @property
    def coming(self) -> list[Any]:
        """What to wait on for actors that were asked for."""
        return list(self._coming)


class _Dispatch:
    """One job's shards over a pool's actors: one shard at an actor at a time."""

    def __init__(self, pool: RayPool, ray: Any, job: Job, pending: list[int]) -> None:
        self._pool = pool
        self._ray = ray
        self._step = job.step
        self._job = ray.put(job)
        self._left = deque(pending)
        self._under_way: dict[Any, tuple[Any, int]] = {}  # result -> (actor, shard)
        self._deaths: Counter[int] = Counter()
        self._idle = pool.ready

    def busy(self) -> list[Any]:
        """Actors that are at a shard; they leave the pool with it."""
        found = [actor for actor, _ in self._under_way.values()]
        for actor in found:
            self._pool.lost(actor)
        return found

    def __call__(self, progress: Progress) -> None:
        """Until all shards are made."""
        while self._left or self._under_way:
            if self._left:
                self._pool.grow(self._ray)
            while self._idle and self._left:
                actor, shard = self._idle.pop(), self._left.popleft()
                self._under_way[actor.run.remote(self._job, shard)] = actor, shard
            for done in self._next():
                if done in self._under_way:
                    self._take(done, progress)
                else:
                    self._welcome(done)

    def _next(self) -> list[Any]:
        waited = [*self._under_way, *(self._pool.coming if self._left else [])]
        timeout = None if self._under_way else START_SECONDS
        done, _ = self._ray.wait(waited, num_returns=1, timeout=timeout)
        if not done:
            raise PruneryError(
                f"step `{self._step}`: expected an actor within {START_SECONDS:g} s; found that the"
                f" cluster has room for none. It has {_resources(self._ray)}: ask for less"
                " (--workers, threads, GPUs), or add nodes."
            )
        return list(done)

    def _welcome(self, signal: Any) -> None:
        actor = self._pool.arrived(signal)
        try:
            self._ray.get(signal)
        except self._ray.exceptions.ActorDiedError as error:
            self._pool.lost(actor)
            raise PruneryError(
                f"step `{self._step}`: an actor could not start: {error}. Check that prunery is"
                " installed on every node."
            ) from error
        except self._ray.exceptions.RayActorError:
            self._pool.lost(actor)  # its node went away; another is asked for
        else:
            self._idle.append(actor)

    def _take(self, result: Any, progress: Progress) -> None:
        actor, shard = self._under_way.pop(result)
        errors = self._ray.exceptions
        try:
            self._ray.get(result)
        except errors.RayTaskError as error:
            self._idle.append(actor)
            cause = error.cause
            raise cause if isinstance(cause, Exception) else error from None
        except (errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            self._pool.lost(actor)
            self._again(shard, error)
        else:
            self._idle.append(actor)
            progress.advance()

    def _again(self, shard: int, error: Exception) -> None:
        self._deaths[shard] += 1
        if self._deaths[shard] > RETRIES:
            raise PruneryError(
                f"the Ray actors of step `{self._step}` died {self._deaths[shard]} times under"
                f" shard {shard} (killed, or out of memory). The shards that were done are kept:"
                " run again, with fewer workers or smaller shards if memory was short."
            ) from error
        self._left.appendleft(shard)


def _ray() -> Any:
    # Ray reports on its use over the network unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its workers at nice 15: beside anything else on the machine they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # An actor that asks for no GPU sees those of its machine, as any other process does.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise PruneryError(
            "the engine `ray` needs the package ray, which is not installed. Run"
            " `pip install 'prunery[ray]'`, or take --engine processes."
        ) from error
    return ray


def _knock(address: str | None) -> None:
    """OSError where nobody listens at host:port; Ray itself goes on asking for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _resources(ray: Any) -> str:
    try:
        found = ray.cluster_resources()
    except ray.exceptions.RayError as error:
        raise StoreError(f"the Ray cluster does not answer: {error}") from error
    return f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"
