"""What a service is told at its start; nothing of it ever comes from a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from ..errors import InputError

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request may ask for, and how much may wait.

    Attributes
    ----------
    body_bytes
        Of a request's body.
    passages
        In one request.
    characters
        Of all passages and titles of one request together; a question has a hundredth of it.
    sentences
        Of all passages of one request together.
    patterns
        Regular expressions of `protect` in one request.
    queued_tokens
        Tokens waiting for one model, padding left out; past them a request gets 429.
    waiting
        Requests of which the text is being cut and tokenised, or waits for it.
    seconds
        From a request's arrival to its answer; past them it gets 504 and its work is dropped.
    """

    body_bytes: int = 8 * MIB
    passages: int = 1000
    characters: int = 1_000_000
    sentences: int = 50_000
    patterns: int = 32
    queued_tokens: int = 1_000_000
    waiting: int = 256
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value <= 0:
                raise InputError(f"the limit `{name}` must be above 0; found {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where the service listens, what it serves, and to whom.

    Attributes
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    models
        Name in requests to what `ContextPruner.from_pretrained` takes; the first is the default.
    device, dtype, backend
        As in `ContextPruner.from_pretrained`, for every model.
    workers
        Threads that run batches of one model; None fits the device.
    batch_wait_seconds
        How long a batch that is not full may wait for more; None fits the device.
    store
        URI of the store whose tables and reports are shown; None shows none.
    prefect_url
        API of the Prefect server on which runs are started (`http://…/api`); None starts none.
    prefect_key
        Its bearer token, if it asks for one.
    keys_file
        One API key a line; read again when it changes. None serves without keys, on loopback only.
    drain_seconds
        How long a stopping service lets requests end.
    limits
        See `Limits`.

    Raises
    ------
    InputError
        No model, a bad name or port, or keys are missing where others than this machine can ask.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    models: Mapping[str, str] = field(default_factory=lambda: {"default": "default"})
    device: str | None = None
    dtype: str | None = None
    backend: str = "torch"
    workers: int | None = None
    batch_wait_seconds: float | None = None
    store: str | None = None
    prefect_url: str | None = None
    prefect_key: str | None = field(default=None, repr=False)
    keys_file: Path | None = None
    drain_seconds: float = 20.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("no model to serve; give one with --model NAME=PATH_OR_ID.")
        for name in self.models:
            if not name or len(name) > 100 or not name.isprintable():
                raise InputError(f"`{name!r:.120}` is no name for a model; use printable letters.")
        if not 0 <= self.port <= 65535:
            raise InputError(f"the port must be 0 to 65535; found {self.port}.")
        if self.keys_file is None and not is_loopback(self.host):
            raise InputError(
                f"listening on {self.host} lets other machines ask, so it needs API keys: put one"
                " a line in a file and give it with --keys FILE, or listen on 127.0.0.1."
            )

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.models))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; False for a name that may mean more."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
