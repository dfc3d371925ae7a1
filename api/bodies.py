"""Request bodies: bounded while they stream in, and JSON that nothing further on can choke on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json
from starlette.types import Message, Receive

from .errors import ServiceError, TooLarge
from .settings import Limits

DRAIN_SECONDS = 5.0
"""How long the rest of a refused body is read and dropped, so that its sender sees the answer."""


class BadBody(ServiceError):
    """The body is not JSON, or JSON that is not taken: 400."""

    status = 400
    kind = "body"


class Unsupported(ServiceError):
    """The body's type or encoding is not taken: 415."""

    status = 415
    kind = "unsupported_media_type"


class SlowBody(ServiceError):
    """The body did not come in time: 408."""

    status = 408
    kind = "timeout"


async def take_body(receive: Receive, headers: Mapping[str, str], limits: Limits) -> bytes | None:
    """The whole body; None where the sender has gone.

    Raises
    ------
    TooLarge
        It is longer than `limits.body_bytes`, by its own account or while it streams in.
    SlowBody
        It took longer than `limits.seconds`.
    Unsupported
        It is compressed: a small one could unfold to any size.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    declared = headers.get("content-length", "")
    try:
        async with asyncio.timeout(limits.seconds):
            if encoding not in ("", "identity"):
                await _drain(receive, limits.body_bytes)
                raise Unsupported(
                    f"Content-Encoding `{encoding:.40}` is not taken; send the body as it is."
                )
            if declared.isdecimal() and int(declared) > limits.body_bytes:
                await _drain(receive, 4 * limits.body_bytes)
                raise _too_large(int(declared), limits)
            return await _read(receive, limits)
    except TimeoutError:
        raise SlowBody(
            f"the body did not arrive within {limits.seconds:g} seconds.",
            headers={"Connection": "close"},  # else its rest may come, for as long as it likes
        ) from None


async def _read(receive: Receive, limits: Limits) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limits.body_bytes:
            await _drain(receive, 4 * limits.body_bytes)
            raise _too_large(size, limits)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _drain(receive: Receive, most: int) -> None:
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(found: int, limits: Limits) -> TooLarge:
    return TooLarge(
        f"the body has {found} bytes or more; {limits.body_bytes} are allowed."
        " Send the passages in several requests."
    )


def check_json(body: bytes, headers: Mapping[str, str], limits: Limits) -> None:
    """Refuse what is not plain JSON of a sensible shape.

    A name that comes twice in an object has its last value, as in Python's and browsers' parsers.

    Raises
    ------
    Unsupported
        The content type is not JSON's. Web pages of other sites cannot send that one unasked.
    BadBody
        Not JSON by RFC 8259 and UTF-8: NaN, half of a surrogate pair, more than 200 levels, ...
    TooLarge
        A list at the top level has more entries than a request may have passages.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Unsupported(f"expected Content-Type: application/json; found `{kind or 'none':.80}`.")
    try:
        parsed: Any = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise BadBody(f"the body is no JSON: {error!s:.200}.") from None
    if not isinstance(parsed, dict):
        return
    for name, value in parsed.items():
        if isinstance(value, list) and len(value) > limits.passages:
            raise TooLarge(
                f"`{name:.80}` has {len(value)} entries; {limits.passages} are allowed in one"
                " request. Send them in several."
            )


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what the server has to say."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
