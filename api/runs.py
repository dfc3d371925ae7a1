"""Runs of deployed recipes: start, list, follow, cancel, on the configured Prefect server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError
from ..storage import Store
from .errors import Busy, NotServed, Upstream
from .prefect_api import TERMINAL, Conflict, Prefect, state_type
from .run_settings import overrides_of
from .run_view import deployment_line, full_run, run_line, snapshot
from .service import Service

POLL_SECONDS = 1.0
"""Between looks at Prefect for one follower."""
PATIENCE_SECONDS = 120.0
"""For how long a follower is kept while Prefect does not answer."""
FOLLOWERS = 64
"""Streams of events at once."""
_OVERLAP_MS = 60_000  # clocks of worker and server differ by less


class Following:
    """What the routes of runs share in one process."""

    def __init__(self) -> None:
        self.prefect: Prefect | None = None
        self.streams = 0


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.following = Following()
    try:
        yield
    finally:
        if app.state.following.prefect is not None:
            await app.state.following.prefect.close()


router = APIRouter(prefix="/v1", tags=["runs"], lifespan=_lifespan)


class RunRequest(BaseModel):
    """Which deployment to run, and with which options of its recipe."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"deployment": "rag", "parameters": {"prune.threshold": 0.2}}]
        },
    )

    deployment: str | None = Field(
        None, max_length=300, description="Name or id of a deployment, as /v1/deployments lists it."
    )
    recipe: str | None = Field(
        None, max_length=300, description="Name of a recipe that is deployed exactly once."
    )
    parameters: dict[str, Any] = Field(
        {},
        description="`step.option` to value: numbers, true, false, null, and names of methods or"
        " choices. Paths and models are set where the recipe is deployed.",
    )
    workers: int | None = Field(None, ge=1, le=256, description="Processes that share the shards.")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _following(request: Request) -> Following:
    state = request.app.state
    if not hasattr(state, "following"):  # an application that runs no lifespan
        state.following = Following()
    following: Following = state.following
    return following


def prefect_of(request: Request) -> Prefect:
    """The configured Prefect server; raises NotServed where there is none."""
    settings = _service(request).settings
    if settings.prefect_url is None:
        raise NotServed(
            "this service starts no runs; start it with --prefect-url http://…/api of a Prefect"
            " server."
        )
    following = _following(request)
    if following.prefect is None:
        following.prefect = Prefect(settings.prefect_url, settings.prefect_key)
    return following.prefect


Server = Annotated[Prefect, Depends(prefect_of)]


@router.get("/deployments", summary="Recipes that are deployed")
async def deployments(prefect: Server) -> dict[str, Any]:
    """What can be started, on which schedule it runs, and whether something serves it."""
    return {"deployments": [deployment_line(one) for one in await prefect.deployments()]}


@router.post("/runs", status_code=202, summary="Start a run of a deployed recipe")
async def start(
    request: Request,
    body: RunRequest,
    prefect: Server,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> dict[str, Any]:
    """Ask Prefect to run it now; a worker or served process takes it up.

    A request with the `Idempotency-Key` of an earlier one gets that one's run.
    """
    parameters: dict[str, Any] = {}
    # The lists of steps and methods are long to import, once.
    overrides = await asyncio.to_thread(overrides_of, body.parameters)
    found = _chosen(await prefect.deployments(), body)
    if overrides:
        given = (found.get("parameters") or {}).get("overrides") or []
        parameters["overrides"] = [*given, *overrides]
    if body.workers is not None:
        parameters["workers"] = body.workers
    made = await prefect.start(found["id"], parameters, idempotency_key=idempotency_key)
    return run_line(made, {found["id"]: found["name"]})


def _chosen(found: list[dict[str, Any]], body: RunRequest) -> dict[str, Any]:
    if (body.deployment is None) == (body.recipe is None):
        raise InputError("give `deployment` or `recipe`, one of them.")
    if body.deployment is not None:
        wanted = body.deployment
        hits = [one for one in found if wanted in (one["id"], one["name"])]
    else:
        wanted = str(body.recipe)
        hits = [one for one in found if deployment_line(one)["recipe"] == wanted]
    names = ", ".join(sorted(one["name"] for one in found)[:20]) or "none"
    if not hits:
        raise NotServed(
            f"`{wanted:.100}` is not deployed with the tag prunery; deployed: {names}. Deploy it"
            " with `prunery deploy`."
        )
    if len(hits) > 1:
        ids = ", ".join(f"{one['name']} ({one['id']})" for one in hits)
        raise Conflict(f"`{wanted:.100}` is deployed {len(hits)} times: {ids}. Give the id.")
    if hits[0].get("paused"):
        raise Conflict(f"deployment `{hits[0]['name']}` is paused; resume it in Prefect.")
    return hits[0]


@router.get("/runs", summary="Latest runs")
async def runs(prefect: Server, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, Any]:
    """Runs that were due by now, latest first."""
    found, deployed = await asyncio.gather(prefect.recent(limit), prefect.deployments())
    names = {one["id"]: one["name"] for one in deployed}
    return {"runs": [run_line(one, names) for one in found]}


@router.get("/runs/{run_id}", summary="A run with its steps")
async def run(request: Request, run_id: UUID, prefect: Server) -> dict[str, Any]:
    """State, steps with progress, and keys of the tables that are known so far."""
    (found, tasks, artifacts), deployed = await asyncio.gather(
        prefect.details(run_id), prefect.deployments()
    )
    names = {one["id"]: one["name"] for one in deployed}
    made = full_run(found, tasks, artifacts, names)
    made["steps_total"] = await asyncio.to_thread(_steps_of, made["recipe"])
    if _service(request).store is not None:
        await asyncio.to_thread(_resolve, _service(request).tables(), made["steps"])
    return made


@router.get("/runs/{run_id}/logs", summary="Last lines of a run's log")
async def logs(
    run_id: UUID, prefect: Server, limit: Annotated[int, Query(ge=1, le=200)] = 100
) -> dict[str, Any]:
    """Oldest first; `level` is that of Python's logging."""
    await prefect.run(run_id)
    found = await prefect.logs(run_id, limit)
    kept = ("timestamp", "level", "name", "message")
    return {"logs": [{name: one.get(name) for name in kept} for one in found]}


@router.post("/runs/{run_id}/cancel", status_code=202, summary="Cancel a run")
async def cancel(run_id: UUID, prefect: Server) -> dict[str, Any]:
    """Ask it to stop: shards that were done stay done, and a later run goes on from them."""
    state = await prefect.cancel(run_id)
    return {"id": str(run_id), "state": state.get("name"), "state_type": state.get("type")}


async def _followed(request: Request, run_id: UUID, prefect: Server) -> AsyncIterator[UUID]:
    """A place among the followers, for a run that is there; said before the stream begins."""
    following = _following(request)
    if following.streams >= FOLLOWERS:
        raise Busy(f"{FOLLOWERS} followers already; ask GET /v1/runs/{run_id} now and then.", 10.0)
    await prefect.run(run_id)
    following.streams += 1
    try:
        yield run_id
    finally:
        following.streams -= 1


@router.get(
    "/runs/{run_id}/events",
    summary="Follow a run",
    response_class=EventSourceResponse,
)
async def events(
    request: Request,
    run_id: Annotated[UUID, Depends(_followed)],
    prefect: Server,
    last_event_id: Annotated[str | None, Header(max_length=40)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `run` and `step` with the whole state of each that changed, then `end`.

    A follower that comes back with `Last-Event-ID` gets what changed since a minute before it,
    so it may see an event twice but misses no change. `problem` says that Prefect does not
    answer; the stream goes on for two minutes then.
    """
    service = _service(request)
    since = _since(last_event_id)
    seen: dict[str, str] = {}
    answered = time.monotonic()
    while service.state != "draining":
        try:
            found, tasks, artifacts = await prefect.details(run_id)
        except (Upstream, NotServed) as error:
            late = time.monotonic() - answered > PATIENCE_SECONDS
            if late or isinstance(error, NotServed):
                yield ServerSentEvent(event="end", data={"message": str(error), "state": None})
                return
            if seen.get("problem") != str(error):
                seen["problem"] = str(error)
                yield ServerSentEvent(event="problem", data={"message": str(error)})
            await asyncio.sleep(5 * POLL_SECONDS)
            continue
        answered = time.monotonic()
        seen.pop("problem", None)
        for item in snapshot(found, tasks, artifacts):
            state = json.dumps(item.data, sort_keys=True)
            known = item.key not in seen and item.at < since  # told before the stream was lost
            if seen.get(item.key) != state and not known:
                yield ServerSentEvent(event=item.event, data=item.data, id=str(item.at))
            seen[item.key] = state
        if state_type(found) in TERMINAL:
            yield ServerSentEvent(event="end", data={"state": run_line(found, {})["state"]})
            return
        await asyncio.sleep(POLL_SECONDS)


def _since(last_event_id: str | None) -> int:
    """Milliseconds since 1970 from which on changes are told."""
    if not last_event_id or not (last_event_id.isascii() and last_event_id.isdigit()):
        return 0
    return max(0, int(last_event_id) - _OVERLAP_MS)


@cache
def _steps_of(recipe: str | None) -> int | None:
    """Number of steps of a recipe that ships with the package; others are not opened here."""
    from ..pipelines.recipe import bundled_recipes, load_recipe

    if recipe is None or recipe not in bundled_recipes():
        return None
    return len(load_recipe(recipe).steps)


def _resolve(store: Store, steps: list[dict[str, Any]]) -> None:
    """Leave keys out that the store on show does not hold."""
    from ..errors import StoreError

    for step in steps:
        if step["table"] is not None:
            try:
                step["table"] = store.resolve(step["table"])
            except StoreError:
                step["table"] = None
