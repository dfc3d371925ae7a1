"""A client for chat endpoints that speak the OpenAI protocol: bounded, patient, and counting.

`POST {base_url}/chat/completions` with `model` and `messages`; hosted services and local servers
(vLLM, llama.cpp, Ollama, TGI) answer it alike. How failures are sorted is told in `openai_calls`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .openai_calls import Caller, CallFailure, Endpoint, Ledger, TryAgainError, retry_after

__all__ = [
    "ChatClient",
    "ChatFailure",
    "ChatReply",
    "Endpoint",
    "Ledger",
    "Messages",
    "retry_after",
]

Messages = Sequence[Mapping[str, str]]
ChatFailure = CallFailure


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What the endpoint said. Token counts are None where it gave none."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    requests: int = 1


@dataclass
class ChatClient:
    """Asks many prompts with bounded concurrency; answers come back in the order asked."""

    endpoint: Endpoint
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        if self.endpoint.max_cost is not None and self.ledger.cost(self.endpoint) is None:
            raise InputError("`max_cost` needs `input_price` and `output_price`; give both.")
        self.endpoint.check_key(stacklevel=3)
        self._caller = Caller(
            self.endpoint,
            "chat/completions",
            _parse,
            self.ledger,
            kept="What was answered in finished shards is kept",
        )

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
        made: dict[int, ChatReply | ChatFailure] = {}
        async with self.endpoint.open_http() as http:
            await self._caller.call_all(http, map(self._body, prompts), made.__setitem__)
        return [made[place] for place in range(len(prompts))]

    def _body(self, messages: Messages) -> dict[str, Any]:
        asked = [dict(message) for message in messages]
        return {"model": self.endpoint.model, "messages": asked, **self.endpoint.sampling()}


def _parse(body: bytes, requests: int) -> ChatReply:
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = reply.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        said = body[:200].decode("utf-8", "replace")
        raise TryAgainError(f"not a chat completion ({error!r}): {said}", broken=True) from error
    if text is not None and not isinstance(text, str):
        raise TryAgainError(f"`content` is {type(text).__name__}, not text", broken=True)
    known = [count if type(count) is int and count >= 0 else None for count in counts]
    return ChatReply(text or "", str(finish), known[0], known[1], requests)
