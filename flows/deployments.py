"""Recipes on a schedule: served by this process, or run by the workers of a Prefect work pool."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..errors import InputError, PruneryError
from ..pipelines.recipe import Recipe, apply_overrides, bundled_recipes, load_recipe
from ..pipelines.steps import STEPS
from ..pipelines.workers import Workers
from ..storage import Store

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

TAG = "prunery"
Overlap = Literal["cancel", "enqueue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a deployment runs, and what happens to runs that overlap.

    Attributes
    ----------
    cron
        A cron line, in `timezone`; not together with `interval`.
    interval
        Seconds from the start of one run to the next.
    timezone
        Of the cron line, such as `Europe/Berlin`; None is UTC.
    limit
        Runs at one time at most.
    overlap
        What becomes of a run beyond `limit`: `cancel` (it would make the same tables), or
        `enqueue`.
    """

    cron: str | None = None
    interval: float | None = None
    timezone: str | None = None
    limit: int = 1
    overlap: Overlap = "cancel"

    def __post_init__(self) -> None:
        if self.cron is not None and self.interval is not None:
            raise InputError("a deployment has one schedule: give --cron or --interval, not both.")
        if self.interval is not None and not self.interval > 0:
            raise InputError(f"expected an interval above 0 s; found {self.interval:g}.")
        if self.timezone is not None and self.cron is None:
            raise InputError("a time zone is of a cron line: give --cron with it.")
        if self.limit < 1:
            raise InputError(f"expected a limit of at least one run; found {self.limit}.")

    def prefect(self) -> Any:
        """The schedule in Prefect's words; None where a run starts only when asked for.

        Raises
        ------
        InputError
            `cron` is no cron line, or `timezone` no time zone.
        """
        from prefect.schedules import Cron, Interval

        try:
            if self.timezone is not None:
                ZoneInfo(self.timezone)
            if self.cron is not None:
                return Cron(self.cron, timezone=self.timezone or "UTC")
            if self.interval is not None:
                return Interval(datetime.timedelta(seconds=self.interval))
        except (ValueError, ZoneInfoNotFoundError) as error:
            said = f"`{self.cron}`" if self.timezone is None else f"`{self.cron}` {self.timezone}"
            raise InputError(f"{said} is no schedule Prefect can read: {error}") from error
        return None


def deployment(
    recipe: str,
    store_uri: str,
    *,
    schedule: Schedule | None = None,
    cron: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    workers: Workers | int = 1,
    reuse: bool = True,
) -> RunnerDeployment:
    """A deployment of a recipe: what to run, on which store, when.

    `cron` alone is short for a `Schedule` with it. Without either it runs only when asked to.

    Raises
    ------
    RecipeError
        The recipe or an override is wrong: said now, not at four in the morning.
    InputError
        The schedule cannot be read.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from .recipe_flow import recipe_flow

    when = schedule or Schedule(cron=cron)
    if not isinstance(workers, Workers):
        workers = Workers(count=workers)
    loaded = apply_overrides(load_recipe(recipe), list(overrides))
    strategy = {
        "cancel": ConcurrencyLimitStrategy.CANCEL_NEW,
        "enqueue": ConcurrencyLimitStrategy.ENQUEUE,
    }[when.overlap]
    try:
        made = recipe_flow.to_deployment(
            name=name or loaded.name,
            schedule=when.prefect(),
            parameters={
                "recipe": recipe if recipe in bundled_recipes() else str(Path(recipe).resolve()),
                "store": str(Store(store_uri).uri),
                "overrides": [_absolute(setting, loaded) for setting in overrides],
                "workers": workers.count,
                "threads": workers.threads,
                "engine": workers.engine,
                "ray_address": workers.ray_address,
                "gpus": workers.gpus,
                "reuse": reuse,
            },
            description=loaded.about or None,
            tags=[TAG, loaded.name],
            concurrency_limit=ConcurrencyLimitConfig(limit=when.limit, collision_strategy=strategy),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        raise InputError(f"this is no deployment Prefect can make: {error}") from error
    if not isinstance(made, RunnerDeployment):
        # Prefect hands out a coroutine where an event loop runs already.
        made.close()
        raise InputError(
            "a deployment cannot be made inside a running event loop; call this from plain code."
        )
    return made


def _absolute(setting: str, loaded: Recipe) -> str:
    """The setting with paths made absolute: the served run may have another working directory."""
    step, _, option = setting.partition("=")[0].strip().partition(".")
    names = {made.name: made.step for made in loaded.steps}
    if step in names and option in STEPS[names[step]].options.paths:
        return f"{step}.{option}={json.dumps(loaded.raw['steps'][step][option])}"
    return setting


def register(made: RunnerDeployment, pool: str) -> str:
    """Register a deployment with a work pool, whose workers run it; its id.

    The flow is named by its module, so that a worker needs prunery installed and no copy of any
    code: a pool of type `process`, or one whose image holds prunery. Recipe file and store must
    be there under the same name.

    Raises
    ------
    PruneryError
        No Prefect server answers, or it has no pool of that name.
    """
    from prefect.deployments.runner import DeploymentApplyError

    if made.schedules is None:
        made.schedules = []  # one that was registered with a schedule loses it
    try:
        with _needs_server():
            return str(made.apply(work_pool_name=pool))
    except DeploymentApplyError as error:
        raise PruneryError(
            f"Prefect did not take the deployment into the work pool `{pool}`: {error}. Make the"
            f" pool first: prefect work-pool create {pool} --type process."
        ) from error


def serve_recipe(
    recipe: str,
    store_uri: str,
    *,
    schedule: Schedule | None = None,
    cron: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    workers: Workers | int = 1,
    reuse: bool = True,
) -> None:
    """Serve a recipe until this process is stopped; see `deployment` for the arguments.

    The schedule stays active when the process stops, so a restarted one picks it up.
    """
    made = deployment(
        recipe,
        store_uri,
        schedule=schedule,
        cron=cron,
        name=name,
        overrides=overrides,
        workers=workers,
        reuse=reuse,
    )
    serve_deployment(made, limit=schedule.limit if schedule else 1)


def serve_deployment(made: RunnerDeployment, *, limit: int = 1) -> None:
    """Serve a deployment until this process is stopped, `limit` runs at one time at most.

    Raises
    ------
    PruneryError
        No Prefect server answers.
    """
    from prefect import serve

    with _needs_server():
        serve(made, pause_on_shutdown=False, limit=limit)


@contextmanager
def _needs_server() -> Iterator[None]:
    """Say what to do where no Prefect server answers."""
    from .recipe_flow import no_server

    try:
        yield
    except Exception as error:
        if not no_server(error):
            raise
        raise PruneryError(
            f"Prefect's server does not answer: {error}. Start one (`prefect server start`) and"
            " set PREFECT_API_URL."
        ) from error
