"""Calls to a server that speaks the OpenAI protocol: bounded, patient, and counting.

One core for whatever is asked: `Caller` posts JSON bodies to one path of an endpoint. What can
go wrong is sorted by who can mend it:

- for a while (429, 5xx, time-outs, broken connections, a reply that is not the protocol's JSON):
  tried again with exponential backoff and jitter, never sooner than `Retry-After` asks;
- this body alone (400, 413, 422, or JSON that stays broken): a `CallFailure` with a reason;
- the whole run (401, 403, 404, redirects, an endpoint that stays away): an error. Nothing more
  is sent then, but replies that are under way are waited for, since they are paid for.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from ..errors import BudgetError, InputError, ModelError, PruneryWarning

if TYPE_CHECKING:
    import ssl

    import httpx

#: A reply longer than this is no completion.
MAX_REPLY_BYTES = 4 << 20
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_AGAIN = {408, 409, 425, 429}
_THIS_BODY = {400, 413, 422}


class Endpoint(BaseModel):
    """Where to ask, how hard, and what it costs.

    The API key is read from the environment variable `api_key_env` and never stored; a server
    that needs none is asked without. `timeout_seconds` bounds one try from connecting to the
    last byte. Prices are per million tokens, in any one currency. `temperature` and `max_tokens`
    None are not sent; `extra` is added to the request as it is (for servers that want, say,
    `max_completion_tokens`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base_url: str
    model: str = Field(min_length=1)
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = Field(0.0, ge=0)
    max_tokens: int | None = Field(256, ge=1)
    extra: dict[str, JsonValue] = Field(default={})
    seed: int | None = None
    concurrency: int = Field(8, ge=1, le=1024)
    timeout_seconds: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)
    backoff_seconds: float = Field(1.0, ge=0)
    longest_wait_seconds: float = Field(120.0, ge=0)
    input_price: float | None = Field(None, ge=0)
    output_price: float | None = Field(None, ge=0)
    max_cost: float | None = Field(None, gt=0)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected a URL such as https://host/v1; found {value!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("the URL must hold no user, password, query or fragment")
        return value.rstrip("/")

    def api_key(self) -> str | None:
        """The key, or None where the variable is unset or empty."""
        return os.environ.get(self.api_key_env) or None

    def sampling(self) -> dict[str, Any]:
        """The fields of a request that say how to write, `extra` among them."""
        named = {name: getattr(self, name) for name in ("temperature", "max_tokens", "seed")}
        return {**self.extra, **{name: at for name, at in named.items() if at is not None}}

    def check_key(self, stacklevel: int = 3) -> None:
        """Warn where the key would go over the network in clear text."""
        host = urlsplit(self.base_url)
        if host.scheme == "http" and host.hostname not in _LOOPBACK and self.api_key():
            warnings.warn(
                f"the API key goes to {host.hostname} in clear text; use https.",
                PruneryWarning,
                stacklevel=stacklevel + 1,
            )

    def open_http(self) -> httpx.AsyncClient:
        """Connections to it, with the key."""
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if (key := self.api_key()) else {}
        # Our own deadline covers the whole try; httpx's would start anew at every byte.
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.AsyncClient(
            headers=headers, timeout=None, limits=limits, verify=_certificates()
        )


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Those that httpx trusts, read once a process: it takes longer than a short answer."""
    import httpx

    return httpx.create_ssl_context()


class Counted(Protocol):
    """A reply that may know its tokens; None where the endpoint gave none."""

    @property
    def prompt_tokens(self) -> int | None: ...

    @property
    def completion_tokens(self) -> int | None: ...


Reply = TypeVar("Reply", bound=Counted)


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Why one body got no reply: a short name and what was seen."""

    reason: Literal["refused", "malformed"]
    detail: str
    requests: int = 1


@dataclass(slots=True)
class Ledger:
    """Running totals of one client. `unpriced` counts replies without token counts."""

    requests: int = 0
    retries: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unpriced: int = 0
    waited_seconds: float = 0.0

    def add(self, reply: Counted) -> None:
        """Count one reply."""
        self.replies += 1
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.unpriced += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0

    def cost(self, endpoint: Endpoint) -> float | None:
        """Price of all counted tokens; None where the endpoint's prices are not given."""
        if endpoint.input_price is None or endpoint.output_price is None:
            return None
        spent = self.prompt_tokens * endpoint.input_price
        return (spent + self.completion_tokens * endpoint.output_price) / 1e6


class TryAgainError(Exception):
    """This try failed in a way that may pass; `wait` is what the server asked for, seconds.

    A parser raises it with `broken` for a reply that is not what the protocol says.
    """

    def __init__(self, what: str, wait: float | None = None, *, broken: bool = False) -> None:
        super().__init__(what)
        self.wait = wait
        self.broken = broken


@dataclass
class Caller(Generic[Reply]):
    """Posts bodies to one path with bounded concurrency.

    Attributes
    ----------
    path
        Under the base URL, such as "chat/completions".
    parse
        Makes a reply of the bytes of a 200 and the number of tries it took; raises
        `TryAgainError` for what is not one.
    kept
        What the user is told about answers so far, where the endpoint stays away.
    mendable
        Options that the user is told to check, where the endpoint refuses everything.
    """

    endpoint: Endpoint
    path: str
    parse: Callable[[bytes, int], Reply]
    ledger: Ledger = field(default_factory=Ledger)
    kept: str = "What was answered is kept"
    mendable: str = "`base_url`, `model`"
    _not_before: float = 0.0

    async def call_all(
        self,
        http: httpx.AsyncClient,
        bodies: Iterable[Mapping[str, Any]],
        done: Callable[[int, Reply | CallFailure], None],
    ) -> None:
        """Ask all; `done(place, reply or failure)` is called for each as it comes.

        Bodies are taken in order, each when its turn comes. After an error, of a call or of
        `done`, nothing more is sent; what is under way is waited for and handed to `done` as
        well, and then the error is raised.

        Raises
        ------
        InputError
            The endpoint refuses the key, the path or the model.
        ModelError
            It stays away: every try for some body timed out or met a server error.
        BudgetError
            `max_cost` is spent.
        """
        left = iter(enumerate(bodies))
        stop = asyncio.Event()
        errors: list[Exception] = []

        async def work() -> None:
            while not stop.is_set() and (job := next(left, None)) is not None:
                try:
                    answer = await self._call(http, job[1], stop)
                    if answer is not None:
                        done(job[0], answer)
                except Exception as error:  # noqa: BLE001 - the first one is raised below
                    errors.append(error)
                    stop.set()

        await asyncio.gather(*(work() for _ in range(self.endpoint.concurrency)))
        if errors:
            raise errors[0]

    async def _call(
        self, http: httpx.AsyncClient, body: Mapping[str, Any], stop: asyncio.Event
    ) -> Reply | CallFailure | None:
        """A reply or failure; None where all work stopped before another try."""
        failed: TryAgainError | None = None
        for attempt in range(self.endpoint.retries + 1):
            if failed is not None:
                await self._pause(attempt, failed, stop)
            await self._wait_for_gate(stop)
            if stop.is_set():
                return None
            self.ledger.retries += failed is not None
            self._check_budget()
            self.ledger.requests += 1
            try:
                answer = await self._try_once(http, body, attempt + 1)
            except TryAgainError as error:
                failed = error
                continue
            if not isinstance(answer, CallFailure):
                self.ledger.add(answer)
            return answer
        if failed is not None and failed.broken:
            return CallFailure("malformed", str(failed), self.endpoint.retries + 1)
        raise ModelError(
            f"{self.endpoint.base_url} gave no answer in {self.endpoint.retries + 1} tries; the"
            f" last: {failed}. {self.kept}: run again later, or with a longer `timeout_seconds`,"
            " more `retries` or less `concurrency`."
        )

    async def _pause(self, attempt: int, failed: TryAgainError, stop: asyncio.Event) -> None:
        backoff = self.endpoint.backoff_seconds * 2 ** (attempt - 1)
        backoff = min(backoff, self.endpoint.longest_wait_seconds) * random.uniform(0.5, 1.0)
        asked = failed.wait or 0.0
        if asked > self.endpoint.longest_wait_seconds:
            raise ModelError(
                f"{self.endpoint.base_url} asks to wait {asked:.0f} s, longer than"
                f" `longest_wait_seconds` = {self.endpoint.longest_wait_seconds:g}. Run again"
                " later, or raise that option."
            )
        if asked:  # the whole account is throttled, so nobody else asks sooner either
            self._not_before = max(self._not_before, time.monotonic() + asked)
        self.ledger.waited_seconds += max(backoff, asked)
        await _sleep(max(backoff, asked), stop)

    async def _wait_for_gate(self, stop: asyncio.Event) -> None:
        while (left := self._not_before - time.monotonic()) > 0 and not stop.is_set():
            await _sleep(left, stop)

    def _check_budget(self) -> None:
        spent, allowed = self.ledger.cost(self.endpoint), self.endpoint.max_cost
        if allowed is not None and spent is not None and spent >= allowed:
            raise BudgetError(
                f"{spent:.4f} of `max_cost` = {allowed:g} is spent after {self.ledger.replies}"
                " replies; nothing more was sent. Raise it and run again to go on from here."
            )

    async def _try_once(
        self, http: httpx.AsyncClient, body: Mapping[str, Any], number: int
    ) -> Reply | CallFailure:
        import httpx

        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                status, headers, got = await self._post(http, body)
        except TimeoutError:
            raise TryAgainError(f"no reply in {self.endpoint.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise TryAgainError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return self.parse(got, number)
        said = got[:300].decode("utf-8", "replace")
        if status in _AGAIN or status >= 500:
            raise TryAgainError(f"HTTP {status}: {said}", retry_after(headers.get("retry-after")))
        if status in _THIS_BODY:
            return CallFailure("refused", f"HTTP {status}: {said}", number)
        raise InputError(
            f"{self.endpoint.base_url} answered HTTP {status}: {said}. Expected 200; check"
            f" {self.mendable} and the key in ${self.endpoint.api_key_env}."
        )

    async def _post(
        self, http: httpx.AsyncClient, body: Mapping[str, Any]
    ) -> tuple[int, Mapping[str, str], bytes]:
        url = f"{self.endpoint.base_url}/{self.path}"
        async with http.stream("POST", url, json=dict(body)) as response:
            got = bytearray()
            async for part in response.aiter_bytes():
                got += part
                if len(got) > MAX_REPLY_BYTES:
                    raise TryAgainError(f"a reply over {MAX_REPLY_BYTES} bytes", broken=True)
            return response.status_code, response.headers, bytes(got)


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    """Sleep, but not on when all work stops."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


def retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date); None if neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    return max(seconds, 0.0) if seconds == seconds else None
