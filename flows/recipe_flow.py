"""The flow: one Prefect task a step. Tasks take and give keys, never rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
from prefect import Flow, flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from ..errors import InputError, ModelError
from ..pipelines.engine import WorkerPool
from ..pipelines.progress import Progress
from ..pipelines.recipe import Recipe, apply_overrides, load_recipe, recipe_of
from ..pipelines.run import RunResult, context_of
from ..pipelines.steps import STEPS
from ..pipelines.workers import Engine, Workers
from ..storage import Manifest, Store
from .progress import published

RETRIES = 2
RETRY_DELAYS: list[float] = [1.0, 5.0]

# A store opened with options (keys of a bucket) and a progress bar are for this process: they
# must not become parameters, which Prefect stores and shows.
_HERE: ContextVar[tuple[Store, Progress | None] | None] = ContextVar("_HERE", default=None)
_POOL: ContextVar[WorkerPool | None] = ContextVar("_POOL", default=None)


@contextmanager
def running_with(store: Store, progress: Progress | None) -> Iterator[None]:
    """Let tasks of this process use this store object and progress."""
    token = _HERE.set((store, progress))
    try:
        yield
    finally:
        _HERE.reset(token)


def _here(uri: str) -> tuple[Store, Progress | None]:
    held = _HERE.get()
    if held is not None and str(held[0].uri) == uri:
        return held
    return Store(uri), None


def no_server(error: Exception) -> bool:
    """Whether Prefect failed to reach or start a server; it says so with a bare RuntimeError."""
    if isinstance(error, httpx.HTTPError):
        return True
    words = ("Failed to reach API", "Timed out while attempting to connect", "ephemeral")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failure may pass by itself: not a wrong input, recipe, budget or model."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, InputError | ModelError)


# No cache: the store knows what exists, by a key that covers options, inputs and models.
@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=worth_retrying,
    task_run_name="{step}",
)
def run_step(
    recipe: dict[str, Any],
    folder: str,
    step: str,
    inputs: dict[str, str],
    store: str,
    workers: int,
    threads: int | None,
    reuse: bool = True,
) -> str:
    """Run one step of a recipe on tables given by key; the key of its table.

    A retry goes on from the journal: shards that were done are not done again.
    """
    checked = recipe_of(recipe, Path(folder))
    this = checked.step(step)
    opened, told = _here(store)
    with published(f"{_slug(checked.name)}-{_slug(step)}-progress", told) as progress:
        context = context_of(
            checked,
            this,
            opened,
            progress=progress,
            workers=workers,
            threads=threads,
            pool=_POOL.get(),
            reuse=reuse,
        )
        return STEPS[this.step](this.options, inputs, context).key


def _run(
    recipe: dict[str, Any],
    folder: str,
    store: str,
    workers: int = 1,
    threads: int | None = None,
    engine: Engine = "processes",
    ray_address: str | None = None,
    gpus: float = 0.0,
    reuse: bool = True,
) -> dict[str, str]:
    """Run every step in order; step name to key."""
    checked = recipe_of(recipe, Path(folder))
    keys: dict[str, str] = {}
    with Workers(engine, workers, threads, ray_address, gpus).open() as pool:
        token = _POOL.set(pool)
        try:
            for step in checked.steps:
                inputs = {role: keys[name] for role, name in step.inputs.items()}
                keys[step.name] = run_step(
                    recipe, folder, step.name, inputs, store, workers, threads, reuse
                )
        finally:
            _POOL.reset(token)
    _publish(checked, _here(store)[0], keys)
    return keys


def flow_of(recipe: Recipe) -> Flow[..., dict[str, str]]:
    """The flow of a recipe, named after it."""
    name = f"prunery-{_slug(recipe.name)}"
    return flow(name=name, description=recipe.about or None, persist_result=False)(_run)


@flow(name="prunery-recipe", persist_result=False)
def recipe_flow(
    recipe: str = "rag",
    store: str = "./prunery-store",
    overrides: list[str] | None = None,
    workers: int = 1,
    threads: int | None = None,
    engine: Engine = "processes",
    ray_address: str | None = None,
    gpus: float = 0.0,
    reuse: bool = True,
) -> dict[str, str]:
    """Run a recipe by name or path, as a deployment does; step name to key."""
    loaded = apply_overrides(load_recipe(recipe), overrides or [])
    return _run(
        dict(loaded.raw),
        str(loaded.folder),
        str(Store(store).uri),
        workers,
        threads,
        engine,
        ray_address,
        gpus,
        reuse,
    )


def _publish(recipe: Recipe, store: Store, keys: Mapping[str, str]) -> None:
    """Artifacts for a person to look at: a table of the steps, a link to the report."""
    manifests = {name: store.manifest(key) for name, key in keys.items()}
    slug = _slug(recipe.name)
    create_table_artifact(
        key=f"{slug}-steps",
        table=[_step_row(name, manifest) for name, manifest in manifests.items()],
        description=f"Tables of recipe {recipe.name} in {store.uri}",
    )
    report = RunResult(recipe.name, store, manifests).report
    if report is not None:
        create_link_artifact(
            key=f"{slug}-report",
            link=report.resolve().as_uri(),
            link_text=f"Report of {recipe.name}",
        )


def _step_row(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "step": name,
        "key": manifest.key[:12],
        "rows": manifest.rows,
        "kept": manifest.kept,
        "dropped": sum(manifest.dropped.values()),
        "rejected": manifest.rejected,
        "seconds": round(manifest.seconds, 1),
    }


def _slug(name: str) -> str:
    """Prefect allows lower-case letters, digits and dashes in the key of an artifact."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "recipe"
