"""The application: routes, limits and errors around one `Service`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from fastapi import FastAPI

from .._version import __version__
from .document import tell_errors
from .metrics import Metrics
from .security import add_security
from .served import close_models, load_models
from .service import Service, open_store
from .settings import Settings
from .watch import Watch

if TYPE_CHECKING:
    from ..pruners.context import ContextPruner

ROUTES = ("health", "prune", "rerank", "methods", "tables", "runs", "page")
"""Modules with a `router`."""


def create_app(
    settings: Settings, *, pruners: Mapping[str, ContextPruner] | None = None
) -> FastAPI:
    """The service as an ASGI application.

    Models are loaded and warmed up on start; `/readyz` says when that is done.

    Parameters
    ----------
    pruners
        Loaded models by name, in place of `settings.models`' loading (tests, embedding in
        another application).

    Raises
    ------
    InputError
        The settings name a store that is not there.
    """
    service = Service(settings=settings, metrics=Metrics(), store=open_store(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = app.state.loading = load_models(service, pruners or {})
        try:
            yield
        finally:
            await close_models(service, loading)

    app = FastAPI(
        title="Prunery",
        version=__version__,
        description="Prunes and reranks retrieved passages; shows and starts pruning runs.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of another host
        redoc_url=None,
    )
    app.state.service = service
    app.state.loading = None
    add_security(app, service)
    app.add_middleware(Watch, service=service)  # the last one added sees a request first
    for name in ROUTES:
        app.include_router(import_module(f".{name}", __package__).router)
    tell_errors(app)
    return app
