"""What can be done here: the catalogue of methods, and the models that are served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from .service import Service

router = APIRouter(prefix="/v1", tags=["catalogue"])


@router.get("/methods", summary="All methods of the library")
def methods() -> dict[str, list[dict[str, Any]]]:
    """What each method prunes, what it needs, and how its budget is given."""
    from ..pruners.catalogue import METHODS, describe

    return {"methods": [dict(describe(name)) for name in METHODS]}


@router.get("/models", summary="Models by name")
async def models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """The models that requests may name; the first is the default."""
    service: Service = request.app.state.service
    listed: list[dict[str, Any]] = []
    for name in service.settings.models:
        served = service.models.get(name)
        entry: dict[str, Any] = {"name": name, "loaded": served is not None}
        if served is not None:
            config = served.config
            entry |= {
                "digest": served.digest,
                "threshold": config.threshold,
                "aggregation": config.aggregation,
                "max_length": config.max_length,
                "licence": getattr(config, "licence", None),
            }
        listed.append(entry)
    return {"models": listed}
