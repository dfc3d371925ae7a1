"""The rerank dialects under one router."""

from __future__ import annotations

from fastapi import APIRouter

from . import rerank_cohere, rerank_jina, rerank_tei

router = APIRouter()
for _dialect in (rerank_tei, rerank_jina, rerank_cohere):
    router.include_router(_dialect.router)
