"""A client of `prunery serve`, synchronous and asynchronous, over httpx.

>>> with Client("http://127.0.0.1:8080", key="...") as client:
...     answer = client.prune("who wrote Emma", passages, threshold=0.3)
...     answer.results[0].text, answer.results[0].relevance
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from ..pipelines.openai_calls import retry_after
from .answers import (
    FailedPassage,
    PruneAnswer,
    RankedPassage,
    RemotePassage,
    RemoteSentence,
    RerankAnswer,
    error_of,
    prune_answer,
    rerank_answer,
)
from .errors import Upstream

__all__ = [
    "AsyncClient",
    "Client",
    "FailedPassage",
    "PruneAnswer",
    "RankedPassage",
    "RemotePassage",
    "RemoteSentence",
    "RerankAnswer",
]

AGAIN = frozenset({429, 503})
"""Statuses of a service that asks to be asked later; nothing was begun."""
SAFE = frozenset({"/v1/prune", "/v1/rerank"})
"""Asked again when the connection breaks half-way: nothing is changed there."""
PATIENCE = 60.0
"""Seconds that a `Retry-After` may ask for; a longer one is raised instead of slept."""


class _Base:
    """What both clients share: settings, bodies, and what a failed try means."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 60.0, retries: int = 3
    ) -> None:
        """`url` of the service, an API key if it asks for one, seconds a try, and more tries."""
        self.url = url.rstrip("/")
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout,
            "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
        }

    def _wait(self, answer: httpx.Response, tries: int) -> float | None:
        """Seconds to the next try; None where there is none."""
        if answer.status_code not in AGAIN or tries >= self.retries:
            return None
        asked = retry_after(answer.headers.get("Retry-After"))
        seconds = _backoff(tries) if asked is None else asked
        # Clients that were refused together should not come back together.
        return None if seconds > PATIENCE else seconds * random.uniform(1.0, 1.25)

    def _wait_broken(self, error: httpx.TransportError, path: str, tries: int) -> float:
        """Seconds to the next try after a broken connection; raises Upstream for none."""
        # A start of a run may have got through: it is asked again only if it never left here.
        unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        lost = path in SAFE and not isinstance(error, httpx.TimeoutException)
        if not (unsent or lost) or tries >= self.retries:
            raise Upstream(
                f"{self.url} did not answer ({type(error).__name__}: {error}). Is the service"
                " running there, and the time-out long enough?"
            ) from error
        return _backoff(tries)


def _backoff(tries: int) -> float:
    return float(min(0.25 * 2**tries, 8.0))


def _prune_body(
    question: str, passages: Sequence[str | Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {"question": question, "passages": list(passages), **given}


def _rerank_body(
    query: str, documents: Sequence[str], top_n: int | None, model: str | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"query": query, "documents": list(documents), "top_n": top_n}
    return {**body, "model": model, "return_documents": False}


def _run_body(deployment: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"deployment": deployment, "parameters": dict(parameters or {})}


def _content(answer: httpx.Response) -> Any:
    if answer.is_success:
        try:
            return answer.json()
        except ValueError as error:
            raise Upstream(
                f"{answer.url} answered no JSON: {answer.text[:200]!r}. Is Prunery served there?"
            ) from error
    raise error_of(answer.status_code, answer.text, answer.headers)


class Client(_Base):
    """Asks a service and waits. Threads may share one; `close` it, or use it in a `with`.

    Requests that the service refuses for being busy (429) or starting (503) are sent again,
    `retries` times, no sooner than it asks. All methods raise `PruneryError` children: what the
    service said, or `Upstream` where it cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`timeout` in seconds for one try; `transport` as in httpx (tests, proxies)."""
        super().__init__(url, key=key, timeout=timeout, retries=retries)
        self._http = httpx.Client(**self._options, transport=transport)

    def prune(
        self, question: str, passages: Sequence[str | Mapping[str, Any]], **options: Any
    ) -> PruneAnswer:
        """Rerank and prune passages; options as in `ContextPruner.prune`, and `model`.

        Passages are strings or `{text, title, id}`. Those that have no score are in `failed`.
        """
        return prune_answer(
            self.request("POST", "/v1/prune", _prune_body(question, passages, options))
        )

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
    ) -> RerankAnswer:
        """Only the order: places and relevance, best first."""
        return rerank_answer(
            self.request("POST", "/v1/rerank", _rerank_body(query, documents, top_n, model))
        )

    def methods(self) -> Any:
        """The catalogue of pruning methods."""
        return self.request("GET", "/v1/methods")

    def models(self) -> Any:
        """The models that are served."""
        return self.request("GET", "/v1/models")

    def tables(self) -> Any:
        """The tables of the store on show."""
        return self.request("GET", "/v1/tables")

    def runs(self) -> Any:
        """The latest runs."""
        return self.request("GET", "/v1/runs")

    def run(self, run_id: str) -> Any:
        """One run: its state and steps."""
        return self.request("GET", f"/v1/runs/{_one_part(run_id)}")

    def start_run(self, deployment: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """Start a deployed recipe."""
        return self.request("POST", "/v1/runs", _run_body(deployment, parameters))

    def cancel_run(self, run_id: str) -> Any:
        """Ask a run to stop."""
        return self.request("POST", f"/v1/runs/{_one_part(run_id)}/cancel")

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Any other route: JSON in, JSON out, with the same patience and errors."""
        tries = 0
        while True:
            try:
                answer = self._http.request(method, path, json=body)
                wait = self._wait(answer, tries)
                if wait is None:
                    return _content(answer)
            except httpx.TransportError as error:
                wait = self._wait_broken(error, path, tries)
            tries += 1
            time.sleep(wait)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(_Base):
    """`Client` for asyncio: the same methods, awaited. Cancelling a call drops its work there."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout` in seconds for one try; `transport` as in httpx (tests, proxies)."""
        super().__init__(url, key=key, timeout=timeout, retries=retries)
        self._http = httpx.AsyncClient(**self._options, transport=transport)

    async def prune(
        self, question: str, passages: Sequence[str | Mapping[str, Any]], **options: Any
    ) -> PruneAnswer:
        """As `Client.prune`."""
        body = _prune_body(question, passages, options)
        return prune_answer(await self.request("POST", "/v1/prune", body))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
    ) -> RerankAnswer:
        """As `Client.rerank`."""
        body = _rerank_body(query, documents, top_n, model)
        return rerank_answer(await self.request("POST", "/v1/rerank", body))

    async def methods(self) -> Any:
        """The catalogue of pruning methods."""
        return await self.request("GET", "/v1/methods")

    async def models(self) -> Any:
        """The models that are served."""
        return await self.request("GET", "/v1/models")

    async def tables(self) -> Any:
        """The tables of the store on show."""
        return await self.request("GET", "/v1/tables")

    async def runs(self) -> Any:
        """The latest runs."""
        return await self.request("GET", "/v1/runs")

    async def run(self, run_id: str) -> Any:
        """One run: its state and steps."""
        return await self.request("GET", f"/v1/runs/{_one_part(run_id)}")

    async def start_run(self, deployment: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """Start a deployed recipe."""
        return await self.request("POST", "/v1/runs", _run_body(deployment, parameters))

    async def cancel_run(self, run_id: str) -> Any:
        """Ask a run to stop."""
        return await self.request("POST", f"/v1/runs/{_one_part(run_id)}/cancel")

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """As `Client.request`."""
        tries = 0
        while True:
            try:
                answer = await self._http.request(method, path, json=body)
                wait = self._wait(answer, tries)
                if wait is None:
                    return _content(answer)
            except httpx.TransportError as error:
                wait = self._wait_broken(error, path, tries)
            tries += 1
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _one_part(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
