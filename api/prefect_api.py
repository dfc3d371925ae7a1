"""A Prefect server over its REST API: only what starting and following runs needs.

Prefect itself is not imported: the service stays light, and speaks to any server of version 3.
Every question is limited to deployments that carry the tag `prunery`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx

from .errors import NotServed, ServiceError, Upstream

TAG = "prunery"
TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
_MINE = {"tags": {"all_": [TAG]}}
_PAGE = 200  # the most that Prefect gives at once
_BUSY = frozenset({429, 502, 503})  # what Prefect's own client asks again after
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds before each further try


class Conflict(ServiceError):
    """What is asked for does not fit the state that a run or deployment is in."""

    status = 409
    kind = "conflict"


class Prefect:
    """One Prefect server.

    Parameters
    ----------
    url
        Of its API, such as `http://127.0.0.1:4200/api`.
    key
        Its bearer token, if it asks for one.

    Every call raises `Upstream` where the server does not answer, refuses the token, or answers
    something else than expected. A server that is busy (429, 502, 503: for SQLite, a locked
    database) is asked again for some seconds: no call does anything twice.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 15.0) -> None:
        headers = {"Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, follow_redirects=False
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def deployments(self) -> list[dict[str, Any]]:
        """All deployments of recipes, by name."""
        found: list[dict[str, Any]] = []
        while True:
            body = {"deployments": _MINE, "limit": _PAGE, "offset": len(found), "sort": "NAME_ASC"}
            page = await self._list("/deployments/filter", body)
            found += page
            if len(page) < _PAGE:
                return found

    async def start(
        self, deployment: str, parameters: Mapping[str, Any], *, idempotency_key: str | None
    ) -> dict[str, Any]:
        """Schedule a run of a deployment now."""
        body: dict[str, Any] = {"parameters": dict(parameters), "state": {"type": "SCHEDULED"}}
        # Never without a key: a busy server is asked again, and must not start a second run.
        body["idempotency_key"] = idempotency_key or str(uuid4())
        return await self._object(f"/deployments/{deployment}/create_flow_run", body)

    async def recent(self, limit: int) -> list[dict[str, Any]]:
        """Runs that were due by now, latest first."""
        now = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
        body = {
            "deployments": _MINE,
            "flow_runs": {"expected_start_time": {"before_": now}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": limit,
        }
        return await self._list("/flow_runs/filter", body)

    async def run(self, run_id: UUID) -> dict[str, Any]:
        """One run; raises NotServed where it is no run of a recipe."""
        body = {"deployments": _MINE, "flow_runs": {"id": {"any_": [str(run_id)]}}}
        found = await self._list("/flow_runs/filter", body)
        if not found:
            raise NotServed(f"no run {run_id} of a recipe; GET /v1/runs lists them.")
        return found[0]

    async def tasks(self, run_id: UUID) -> list[dict[str, Any]]:
        """Its task runs in the order in which they began."""
        body = {
            "task_runs": {"flow_run_id": {"any_": [str(run_id)]}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": _PAGE,
        }
        found = await self._list("/task_runs/filter", body)
        return sorted(found, key=lambda one: str(one.get("expected_start_time") or ""))

    async def artifacts(self, run_id: UUID) -> list[dict[str, Any]]:
        """What the run published: progress, a table of its steps, a link to the report."""
        body = {
            "artifacts": {"flow_run_id": {"any_": [str(run_id)]}},
            "sort": "UPDATED_DESC",
            "limit": _PAGE,
        }
        return await self._list("/artifacts/filter", body)

    async def details(
        self, run_id: UUID
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        """(run, tasks, artifacts), asked for together."""
        run, tasks, artifacts = await asyncio.gather(
            self.run(run_id), self.tasks(run_id), self.artifacts(run_id)
        )
        return run, tasks, artifacts

    async def logs(self, run_id: UUID, limit: int) -> list[dict[str, Any]]:
        """The last lines of its log, oldest first."""
        body = {
            "logs": {"flow_run_id": {"any_": [str(run_id)]}},
            "sort": "TIMESTAMP_DESC",
            "limit": limit,
        }
        return (await self._list("/logs/filter", body))[::-1]

    async def cancel(self, run_id: UUID) -> dict[str, Any]:
        """Ask a run to stop; the state it is in afterwards.

        Raises
        ------
        Conflict
            It has ended already.
        """
        before = await self.run(run_id)
        if state_type(before) in TERMINAL:
            raise Conflict(f"run {run_id} has ended already: {state_type(before)}.")
        state = {"type": "CANCELLING", "name": "Cancelling"}
        told = await self._object(f"/flow_runs/{run_id}/set_state", {"state": state})
        now = told.get("state") or {}
        if now.get("type") not in ("CANCELLING", "CANCELLED"):
            reason = (told.get("details") or {}).get("reason") or told.get("status")
            raise Conflict(f"Prefect does not cancel run {run_id}: {reason}.")
        return dict(now)

    async def _list(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = await self._post(path, body)
        if not isinstance(found, list):
            raise Upstream(f"{self.url}{path} gave no list. Is that the API of Prefect 3?")
        return found

    async def _object(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found = await self._post(path, body)
        if not isinstance(found, dict):
            raise Upstream(f"{self.url}{path} gave no object. Is that the API of Prefect 3?")
        return found

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            answer = await self._client.post(path, json=body)
            for pause in _PAUSES:
                if answer.status_code not in _BUSY:
                    break
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                answer = await self._client.post(path, json=body)
        except httpx.TimeoutException as error:
            raise Upstream(
                f"the Prefect server at {self.url} took too long to answer. Ask again in a moment."
            ) from error
        except httpx.HTTPError as error:
            raise Upstream(
                f"no Prefect server answers at {self.url} ({error or type(error).__name__}). Start"
                " it with `prefect server start`, or mend --prefect-url."
            ) from error
        if answer.status_code in (401, 403):
            raise Upstream(
                f"the Prefect server at {self.url} refuses this service's token. Give its key when"
                " the service is started."
            )
        if answer.status_code == 404:
            raise NotServed(f"the Prefect server has nothing at {path}; it may have been deleted.")
        if answer.status_code in (409, 422):
            raise Conflict(f"Prefect refuses: {_detail(answer)}")
        if not answer.is_success:
            raise Upstream(
                f"the Prefect server at {self.url} answers {answer.status_code}: {_detail(answer)}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise Upstream(
                f"{self.url} answers, but not as the API of Prefect does. Does the URL end in /api?"
            ) from error


def state_type(one: Mapping[str, Any]) -> str | None:
    """Type of the state of a flow run or task run."""
    return (one.get("state") or {}).get("type") or one.get("state_type")


def _detail(answer: httpx.Response) -> str:
    try:
        told = answer.json()
    except ValueError:
        return answer.text[:200]
    detail = told.get("detail") or told.get("exception_message") if isinstance(told, dict) else told
    return str(detail)[:300]
