"""Whether the process lives, whether it is ready, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .service import Service

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the process works")
async def healthz(request: Request) -> JSONResponse:
    """200 while the process can work at all; 503 once a thread of a model has died: restart it."""
    service: Service = request.app.state.service
    dead = [name for name, served in list(service.models.items()) if not served.alive]
    if dead:
        return JSONResponse({"status": "failed", "dead": dead}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Whether requests are taken")
async def readyz(request: Request) -> JSONResponse:
    """200 with state "ready"; 503 with "starting" before warm-up and "draining" at the end."""
    service: Service = request.app.state.service
    ready = service.state == "ready"
    body = {"state": service.state, "models": sorted(service.models)}
    headers = {} if ready else {"Retry-After": "1"}
    return JSONResponse(body, 200 if ready else 503, headers)


@router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
async def metrics(request: Request) -> Response:
    """Requests, batches, queues, models and the process."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")
