"""A client for chat endpoints that speak the OpenAI protocol: bounded, patient, and counting.

`POST {base_url}/chat/completions` with `model` and `messages`; hosted services and local servers
(vLLM, llama.cpp, Ollama, TGI) answer it alike. What can go wrong is sorted by who can mend it:

- for a while (429, 5xx, time-outs, broken connections, a reply that is not the protocol's JSON):
  tried again with exponential backoff and jitter, never sooner than `Retry-After` asks;
- this prompt alone (400, 413, 422, or JSON that stays broken): a `ChatFailure` with a reason;
- the whole run (401, 403, 404, redirects, an endpoint that stays away): an error that stops it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from ..errors import BudgetError, InputError, ModelError, PruneryWarning

if TYPE_CHECKING:
    import httpx

Messages = Sequence[Mapping[str, str]]

#: A reply longer than this is not a chat completion.
MAX_REPLY_BYTES = 4 << 20
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_AGAIN = {408, 409, 425, 429}
_THIS_PROMPT = {400, 413, 422}


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


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What the endpoint said. Token counts are None where it gave none."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    requests: int = 1


@dataclass(frozen=True, slots=True)
class ChatFailure:
    """Why one prompt got no reply: a short name and what was seen."""

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

    def add(self, reply: ChatReply) -> None:
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


class _TryAgainError(Exception):
    """This try failed in a way that may pass; `wait` is what the server asked for, seconds."""

    def __init__(self, what: str, wait: float | None = None, *, broken: bool = False) -> None:
        super().__init__(what)
        self.wait = wait
        self.broken = broken


@dataclass
class ChatClient:
    """Asks many prompts with bounded concurrency; answers come back in the order asked."""

    endpoint: Endpoint
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        host = urlsplit(self.endpoint.base_url)
        if self.endpoint.max_cost is not None and self.ledger.cost(self.endpoint) is None:
            raise InputError("`max_cost` needs `input_price` and `output_price`; give both.")
        if host.scheme == "http" and host.hostname not in _LOOPBACK and self.endpoint.api_key():
            warnings.warn(
                f"the API key goes to {host.hostname} in clear text; use https.",
                PruneryWarning,
                stacklevel=3,
            )
        self._not_before = 0.0

    def ask_all(self, prompts: Sequence[Messages]) -> list[ChatReply | ChatFailure]:
        """One answer or failure for each prompt, in order.

        Raises
        ------
        InputError
            The endpoint refuses the key, the path or the model.
        ModelError
            It stays away: every retry of some prompt timed out or met a server error.
        BudgetError
            `max_cost` is spent. Nothing more is sent.
        """
        return asyncio.run(self._ask_all(prompts))

    async def _ask_all(self, prompts: Sequence[Messages]) -> list[ChatReply | ChatFailure]:
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if (key := self.endpoint.api_key()) else {}
        gate = asyncio.Semaphore(self.endpoint.concurrency)
        # Our own deadline covers the whole try; httpx's would start anew at every byte.
        limits = httpx.Limits(max_connections=self.endpoint.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as http:

            async def one(messages: Messages) -> ChatReply | ChatFailure:
                async with gate:
                    return await self._ask(http, messages)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(messages)) for messages in prompts]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, http: httpx.AsyncClient, messages: Messages) -> ChatReply | ChatFailure:
        failed: _TryAgainError | None = None
        for attempt in range(self.endpoint.retries + 1):
            if failed is not None:
                self.ledger.retries += 1
                await self._pause(attempt, failed)
            await self._wait_for_gate()
            self._check_budget()
            self.ledger.requests += 1
            try:
                answer = await self._try_once(http, messages, attempt + 1)
            except _TryAgainError as error:
                failed = error
                continue
            if isinstance(answer, ChatReply):
                self.ledger.add(answer)
            return answer
        if failed is not None and failed.broken:
            return ChatFailure("malformed", str(failed), self.endpoint.retries + 1)
        raise ModelError(
            f"{self.endpoint.base_url} gave no answer in {self.endpoint.retries + 1} tries; the"
            f" last: {failed}. What was answered in finished shards is kept: run again later, or"
            " with a longer `timeout_seconds`, more `retries` or less `concurrency`."
        )

    async def _pause(self, attempt: int, failed: _TryAgainError) -> None:
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
        await asyncio.sleep(max(backoff, asked))

    async def _wait_for_gate(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _check_budget(self) -> None:
        spent, allowed = self.ledger.cost(self.endpoint), self.endpoint.max_cost
        if allowed is not None and spent is not None and spent >= allowed:
            raise BudgetError(
                f"{spent:.4f} of `max_cost` = {allowed:g} is spent after {self.ledger.replies}"
                " replies; nothing more was sent. Raise it and run again to go on from here."
            )

    async def _try_once(
        self, http: httpx.AsyncClient, messages: Messages, number: int
    ) -> ChatReply | ChatFailure:
        import httpx

        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                status, headers, body = await self._post(http, messages)
        except TimeoutError:
            raise _TryAgainError(f"no reply in {self.endpoint.timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return _parse(body, number)
        said = body[:300].decode("utf-8", "replace")
        if status in _AGAIN or status >= 500:
            raise _TryAgainError(f"HTTP {status}: {said}", retry_after(headers.get("retry-after")))
        if status in _THIS_PROMPT:
            return ChatFailure("refused", f"HTTP {status}: {said}", number)
        raise InputError(
            f"{self.endpoint.base_url} answered HTTP {status}: {said}. Expected 200; check"
            f" `base_url`, `model` and the key in ${self.endpoint.api_key_env}."
        )

    async def _post(
        self, http: httpx.AsyncClient, messages: Messages
    ) -> tuple[int, Mapping[str, str], bytes]:
        asked: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [dict(message) for message in messages],
            **self.endpoint.extra,
        }
        for name in ("temperature", "max_tokens", "seed"):
            if (value := getattr(self.endpoint, name)) is not None:
                asked[name] = value
        url = f"{self.endpoint.base_url}/chat/completions"
        async with http.stream("POST", url, json=asked) as response:
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_REPLY_BYTES:
                    raise _TryAgainError(f"a reply over {MAX_REPLY_BYTES} bytes", broken=True)
            return response.status_code, response.headers, bytes(body)


def _parse(body: bytes, requests: int) -> ChatReply:
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = reply.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        said = body[:200].decode("utf-8", "replace")
        raise _TryAgainError(f"not a chat completion ({error!r}): {said}", broken=True) from error
    if text is not None and not isinstance(text, str):
        raise _TryAgainError(f"`content` is {type(text).__name__}, not text", broken=True)
    known = [count if type(count) is int and count >= 0 else None for count in counts]
    return ChatReply(text or "", str(finish), known[0], known[1], requests)


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
