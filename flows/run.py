"""Run a recipe under Prefect. Importing this module does not import Prefect."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import PruneryError
from ..pipelines.progress import Progress
from ..pipelines.recipe import Recipe
from ..pipelines.run import RunResult
from ..pipelines.workers import Workers
from ..storage import Store

# What a person at a terminal wants of Prefect; each can be overruled by the environment.
_QUIET = {
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}


def run_flow(
    recipe: Recipe,
    store: Store | str,
    *,
    progress: Progress | None = None,
    workers: Workers | int = 1,
    threads: int | None = None,
    reuse: bool = True,
    quiet: bool = True,
) -> RunResult:
    """Run every step of a recipe as a Prefect task; the rows are those of `run_recipe`.

    Uses the server that PREFECT_API_URL or the active profile names, else an ephemeral one
    that lives as long as this process.

    Parameters
    ----------
    workers, threads, reuse
        As in `run_recipe`.
    quiet
        Let Prefect log errors alone, as far as the environment does not say otherwise.

    Raises
    ------
    PruneryError
        A step failed, or no Prefect server answers.
    """
    if quiet:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    from .recipe_flow import flow_of, no_server, running_with

    if not isinstance(workers, Workers):
        workers = Workers(count=workers, threads=threads)
    opened = Store(store) if isinstance(store, str | Path) else store
    try:
        with running_with(opened, progress):
            keys = flow_of(recipe)(
                recipe=dict(recipe.raw),
                folder=str(recipe.folder),
                store=str(opened.uri),
                workers=workers.count,
                threads=workers.threads,
                engine=workers.engine,
                ray_address=workers.ray_address,
                gpus=workers.gpus,
                reuse=reuse,
            )
    except Exception as error:
        if not no_server(error):
            raise
        raise PruneryError(
            f"Prefect's server does not answer: {error}. Check PREFECT_API_URL, or run without"
            " Prefect (--plain)."
        ) from error
    return RunResult(
        recipe.name, opened, {name: opened.manifest(key) for name, key in keys.items()}
    )
