"""Recipes on a schedule: served by a process that waits for their time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..pipelines.recipe import Recipe, apply_overrides, bundled_recipes, load_recipe
from ..pipelines.steps import STEPS
from ..storage import Store

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def deployment(
    recipe: str,
    store_uri: str,
    *,
    cron: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    workers: int = 1,
) -> RunnerDeployment:
    """A deployment of a recipe: what to run, on which store, when.

    One run at a time; a run that comes while another is under way is cancelled, as it would
    make the same tables. Without `cron` it runs only when asked to.

    Raises
    ------
    RecipeError
        The recipe or an override is wrong: said now, not at four in the morning.
    InputError
        `cron` is no cron line.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from .recipe_flow import recipe_flow

    overrides = list(overrides)
    loaded = apply_overrides(load_recipe(recipe), overrides)
    try:
        made = recipe_flow.to_deployment(
            name=name or loaded.name,
            cron=cron,
            parameters={
                "recipe": recipe if recipe in bundled_recipes() else str(Path(recipe).resolve()),
                "store": str(Store(store_uri).uri),
                "overrides": [_absolute(setting, loaded) for setting in overrides],
                "workers": workers,
            },
            description=loaded.about or None,
            tags=["prunery", loaded.name],
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        raise InputError(f"`{cron}` is no schedule Prefect can read: {error}") from error
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


def serve_recipe(
    recipe: str,
    store_uri: str,
    *,
    cron: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    workers: int = 1,
) -> None:
    """Serve a recipe until this process is stopped; see `deployment` for the arguments.

    The schedule stays active when the process stops, so a restarted one picks it up.
    """
    from prefect import serve

    made = deployment(recipe, store_uri, cron=cron, name=name, overrides=overrides, workers=workers)
    serve(made, pause_on_shutdown=False, limit=1)
