"""What a request can be refused for, and how each dialect words it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BudgetError, InputError, ModelError, PruneryError, StoreError


class ServiceError(PruneryError):
    """A request that gets no result.

    Attributes
    ----------
    status
        HTTP status.
    kind
        One word for programs.
    headers
        To send along.
    """

    status = 500
    kind = "internal"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class Busy(ServiceError):
    """The queue is full: 429, and when to come again."""

    status = 429
    kind = "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        """`retry_after` in seconds, sent rounded up and at least 1."""
        super().__init__(message, headers={"Retry-After": str(max(1, -int(-retry_after // 1)))})


class TimedOut(ServiceError):
    """The answer took longer than allowed; its work was dropped."""

    status = 504
    kind = "timeout"


class Stopping(ServiceError):
    """The service drains or has not warmed up: 503."""

    status = 503
    kind = "unavailable"


class NotServed(ServiceError):
    """A model, table, run or report of that name is not on the list."""

    status = 404
    kind = "not_found"


class TooLarge(ServiceError):
    """The request is past a limit."""

    status = 413
    kind = "too_large"


class Unauthorised(ServiceError):
    """No API key, or none that is known."""

    status = 401
    kind = "unauthorised"


class Upstream(ServiceError):
    """Another server that this one asks did not answer as expected."""

    status = 502
    kind = "upstream"


def status_of(error: PruneryError) -> tuple[int, str]:
    """HTTP status and one word for an error of ours."""
    if isinstance(error, ServiceError):
        return error.status, error.kind
    if isinstance(error, BudgetError):
        return 422, "budget"
    if isinstance(error, InputError):
        return 422, "validation"
    if isinstance(error, StoreError):
        return 404, "not_found"
    if isinstance(error, ModelError):
        return 424, "model"
    return 500, "internal"


def body_of(path: str, status: int, kind: str, message: str, details: list[Any]) -> dict[str, Any]:
    """The JSON body of an error in the dialect that is spoken at `path`.

    text-embeddings-inference at /rerank, Jina at /v1/rerank, Cohere at /v2/rerank; ours elsewhere.
    """
    if path == "/rerank":
        return {"error": message, "error_type": kind}
    if path == "/v1/rerank":
        return {"detail": message, "errors": details}
    if path == "/v2/rerank":
        return {"message": message}
    return {"error": {"type": kind, "message": message, "details": details}}
