"""Prefect's objects in the service's words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any, NamedTuple

from .prefect_api import TAG, state_type

Names = Mapping[str, str]


class Item(NamedTuple):
    """A run or step as it stands: event name, what it is told apart by, when it became so."""

    event: str
    key: str
    at: int  # milliseconds since 1970
    data: dict[str, Any]


def deployment_line(one: Mapping[str, Any]) -> dict[str, Any]:
    """A deployment: what it runs, when, and whether something serves it."""
    parameters = one.get("parameters") or {}
    recipe = parameters.get("recipe")
    tags = [tag for tag in one.get("tags") or [] if tag != TAG]
    return {
        "id": one["id"],
        "name": one["name"],
        # A recipe given by path is known by its name, which is a tag; its folder is not told.
        "recipe": recipe if isinstance(recipe, str) and recipe in tags else next(iter(tags), None),
        "description": one.get("description"),
        "paused": bool(one.get("paused")),
        "status": one.get("status"),
        "schedules": [
            _schedule(item.get("schedule") or {})
            for item in one.get("schedules") or []
            if item.get("active", True)
        ],
        "overrides": parameters.get("overrides") or [],
        "work_pool": one.get("work_pool_name"),
    }


def _schedule(given: Mapping[str, Any]) -> str:
    if given.get("cron"):
        zone = given.get("timezone") or "UTC"
        return f"cron {given['cron']} ({zone})"
    if given.get("interval"):
        return f"every {float(given['interval']):g} seconds"
    return f"rrule {given['rrule']}" if given.get("rrule") else "unknown"


def run_line(run: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """A run in one line."""
    state = run.get("state") or {}
    parameters = run.get("parameters") or {}
    recipe = parameters.get("recipe")
    return {
        "id": run["id"],
        "name": run.get("name"),
        "deployment": names.get(str(run.get("deployment_id"))),
        "recipe": PurePath(recipe).name if isinstance(recipe, str) else None,
        "state": state.get("name") or run.get("state_name"),
        "state_type": state_type(run),
        "message": state.get("message"),
        "expected": run.get("expected_start_time"),
        "started": run.get("start_time"),
        "ended": run.get("end_time"),
        "seconds": _seconds(run),
        "tries": run.get("run_count", 0),
    }


def full_run(
    run: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    artifacts: Sequence[Mapping[str, Any]],
    names: Names,
) -> dict[str, Any]:
    """A run with its steps: states, progress, and keys of tables as far as they were published."""
    made = run_line(run, names)
    given = run.get("parameters") or {}
    progress = progress_of(artifacts)
    keys = _keys(artifacts)
    made["overrides"] = given.get("overrides") or []
    made["steps"] = [
        step_line(one, progress.get(str(one["id"])), keys.get(str(one.get("name"))))
        for one in tasks
    ]
    return made


def step_line(task: Mapping[str, Any], progress: float | None, table: str | None) -> dict[str, Any]:
    """A step of a run; `progress` in percent where it is published."""
    state = task.get("state") or {}
    kind = state_type(task)
    return {
        "id": task["id"],
        "name": task.get("name"),
        "state": state.get("name") or task.get("state_name"),
        "state_type": kind,
        "message": state.get("message"),
        "progress": 100.0 if kind == "COMPLETED" else progress,
        "started": task.get("start_time"),
        "seconds": _seconds(task),
        "tries": task.get("run_count", 0),
        "table": table,
    }


def progress_of(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Task run id to percent, from progress artifacts, the newest of each first."""
    found: dict[str, float] = {}
    for one in artifacts:
        if one.get("type") == "progress" and isinstance(one.get("data"), int | float):
            found.setdefault(str(one.get("task_run_id")), float(one["data"]))
    return found


def _keys(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Step name to the beginning of its table's key, from the published table of steps."""
    found: dict[str, str] = {}
    for one in artifacts:
        if one.get("type") != "table":
            continue
        data = one.get("data")
        try:
            rows = json.loads(data) if isinstance(data, str) else data
        except ValueError:
            continue
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and {"step", "key"} <= row.keys():
                found.setdefault(str(row["step"]), str(row["key"]))
    return found


def snapshot(
    run: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    artifacts: Sequence[Mapping[str, Any]],
) -> Iterator[Item]:
    """The run and its steps as they stand."""
    progress = progress_of(artifacts)
    for task in tasks:
        line = step_line(task, progress.get(str(task["id"])), None)
        # What grows by itself is left out: a step that merely goes on is no news.
        data = {name: line[name] for name in ("id", "name", "state", "state_type", "message")}
        data |= {"progress": line["progress"], "tries": line["tries"]}
        yield Item("step", str(task["id"]), _at(task), data)
    line = run_line(run, {})
    data = {name: line[name] for name in ("id", "name", "state", "state_type", "message")}
    data["steps_done"] = sum(state_type(task) == "COMPLETED" for task in tasks)
    yield Item("run", str(run["id"]), max([_at(run), *(_at(task) for task in tasks)]), data)


def _at(one: Mapping[str, Any]) -> int:
    stamp = (one.get("state") or {}).get("timestamp") or one.get("updated") or one.get("created")
    try:
        return int(datetime.fromisoformat(str(stamp)).timestamp() * 1000)
    except ValueError:
        return 0


def _seconds(one: Mapping[str, Any]) -> float | None:
    """Run time: what Prefect estimates while it goes on, which ends as the total."""
    value = one.get("estimated_run_time") or one.get("total_run_time")
    return float(value) if value else None
