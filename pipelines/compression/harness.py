"""Tasks of lm-evaluation-harness, for those who have it installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ModelError, RecipeError
from .gate import TaskScore

# The first of these that a task reports is what it is judged by.
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "mcc", "word_perplexity", "perplexity")


def task_scores(
    folder: Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    device: str = "cpu",
    task_folder: str | None = None,
) -> dict[str, TaskScore]:
    """Run a model's folder through tasks of lm-evaluation-harness.

    A metric where lower is better is negated, so that higher is better throughout.

    Raises
    ------
    RecipeError
        The harness is not installed, or has no task of that name.
    ModelError
        A task cannot be run (its data is not on this machine, say).
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            "tasks: expected lm-evaluation-harness, found none. Install it with: pip install"
            " lm-eval, or leave `tasks` empty."
        ) from error
    manager = TaskManager(include_path=task_folder)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise RecipeError(
            f"tasks: expected names that lm-evaluation-harness knows, found {', '.join(unknown)}."
            " `lm-eval ls tasks` lists them; `task_folder` adds your own."
        )
    try:
        made: Mapping[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "auto", "trust_remote_code": False},
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            device=device,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ConnectionError) as error:
        raise ModelError(
            f"{folder}: expected lm-evaluation-harness to run {', '.join(tasks)}; found"
            f" {type(error).__name__}: {error}. Fetch the tasks' data first, or leave them out."
        ) from error
    better = made.get("higher_is_better", {})
    return {name: _score(name, made["results"][name], better.get(name) or {}) for name in tasks}


def _score(name: str, results: Mapping[str, Any], higher: Mapping[str, bool | None]) -> TaskScore:
    found = {
        key.partition(",")[0]: (key, float(value))
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    metric = next((known for known in _METRICS if known in found), None)
    metric = metric or next(iter(sorted(found)), None)
    if metric is None:
        raise ModelError(
            f"tasks: expected {name} to report a number, found {sorted(results)}. Name another"
            " task."
        )
    key, value = found[metric]
    first, _, rest = key.partition(",")
    error = results.get(f"{first}_stderr,{rest}")
    stderr = float(error) if isinstance(error, int | float) else math.nan
    return TaskScore(metric, value if higher.get(metric, True) else -value, stderr)
