"""POST /v1/prune: the library's result as JSON, strict input, and errors in place of scores."""

import json
import time

import pytest
from fastapi.testclient import TestClient

from prunery.api.settings import Limits

from .live import PASSAGES, QUESTION, application, scripted_pruner

pytest.importorskip("prometheus_client")


@pytest.fixture(scope="module")
def client():
    limits = Limits(passages=20, characters=4000, sentences=30, patterns=3)
    app = application(limits=limits)
    with TestClient(app, base_url="http://127.0.0.1") as made:
        end = time.monotonic() + 60
        while made.get("/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield made


def ask(client, status=200, **body):
    body = {"question": QUESTION, "passages": PASSAGES, **body}
    answer = client.post("/v1/prune", content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == status, answer.text
    return answer.json()


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.12, "top_k": 2},
        {"aggregation": "vote", "on_empty": "top1"},
        {"max_tokens": 6, "min_sentences": 1},
        {"titles": ["Weather", None, "Boats"], "keep_title": False},
        {"titles": "first_sentence", "on_empty": "original"},
    ],
)
def test_the_answer_is_the_librarys(client, options):
    answer = ask(client, **options)
    expected = scripted_pruner().prune(QUESTION, PASSAGES, **options)
    assert [one["index"] for one in answer["results"]] == [one.index for one in expected]
    for ours, theirs in zip(answer["results"], expected, strict=True):
        for name in ("text", "chars_in", "chars_out", "tokens_in", "tokens_out", "blocks"):
            assert ours[name] == getattr(theirs, name)
        for name in ("relevance", "relevance_logit", "compression"):
            assert ours[name] == pytest.approx(getattr(theirs, name), abs=1e-5)
        kept = [(s["start"], s["end"], s["kept"], s["reason"]) for s in ours["sentences"]]
        assert kept == [(s.start, s.end, s.kept, s.reason) for s in theirs.sentences]
    assert answer["threshold"] == options.get("threshold", 0.5)
    assert answer["usage"]["tokens_out"] == sum(one.tokens_out for one in expected)


def test_passages_may_be_objects_with_titles_and_ids(client):
    answer = ask(client, passages=["A harbour.", {"text": "B.", "title": "T", "id": "x"}])
    by_index = {one["index"]: one for one in answer["results"]}
    assert by_index[1]["id"] == "x" and "id" not in by_index[0]


def test_a_passage_without_a_score_carries_its_error_and_comes_last(client):
    answer = ask(client, passages=["poison harbour.", *PASSAGES])
    last = answer["results"][-1]
    assert set(last) == {"index", "error"} and last["index"] == 0
    assert last["error"]["type"] == "model" and "not finite" in last["error"]["message"]
    assert [one["index"] for one in answer["results"][:-1]] == [2, 3, 1]


def test_sentences_and_what_a_page_needs_to_decide_again_are_optional(client):
    assert all("sentences" not in one for one in ask(client, sentences=False)["results"])
    scored = ask(client, return_scores=True)["results"][0]
    assert sum(one["tokens"] for one in scored["sentences"]) == scored["tokens_in"]
    assert {"title_score", "title_tokens"} <= set(scored)


def test_protected_sentences_stay(client):
    pytest.importorskip("re2")
    answer = ask(client, protect=["inn|snow", "^Nobody"])
    reasons = [s["reason"] for one in answer["results"] for s in one["sentences"]]
    assert reasons.count("protected") == 2


def test_a_pattern_that_backtracks_without_end_elsewhere_is_harmless(client):
    pytest.importorskip("re2")
    ask(client, protect=["(a+)+$"], passages=["a" * 3000 + "!"])


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (422, {"question": "  "}, "blank"),
        (422, {"thresold": 0.5}, "thresold"),
        (422, {"threshold": 2}, "threshold"),
        (422, {"threshold": "0.5"}, "threshold"),
        (400, {"threshold": float("nan")}, "JSON"),
        (422, {"top_k": 0}, "top_k"),
        (422, {"top_k": True}, "top_k"),
        (422, {"passages": [1]}, "passages"),
        (422, {"passages": [{"text": "a", "href": "file:///etc/passwd"}]}, "href"),
        (422, {"titles": ["a"]}, "titles"),
        (422, {"titles": ["a"], "passages": [{"text": "a", "title": "b"}]}, "titles"),
        (422, {"protect": ["(?=a)"]}, "protect[0]"),
        (422, {"protect": ["a" * 2000]}, "protect[0]"),
        (413, {"protect": ["a"] * 4}, "4 patterns; 3"),
        (413, {"passages": ["a"] * 21}, "21 entries; 20"),
        (413, {"passages": ["a" * 4001]}, "4001 characters; 4000"),
        (413, {"passages": ["One. Two. Three. Four."] * 8}, "32 sentences; 30"),
        (413, {"question": "a" * 41}, "41 characters; 40"),
        (404, {"model": "/etc/passwd"}, "/etc/passwd"),
        (422, {"max_tokens": 1, "protect": ["harbour"]}, "max_tokens"),
    ],
)
def test_what_is_refused_and_why(client, status, body, said):
    if "protect" in body:
        pytest.importorskip("re2")
    answer = ask(client, status, **body)
    assert said in json.dumps(answer, ensure_ascii=False)
    assert set(answer) == {"error"}


def test_no_passages_give_no_results(client):
    assert ask(client, passages=[])["results"] == []


def test_a_lone_surrogate_is_refused_before_it_can_break_an_answer(client):
    ask(client, 400, passages=["harbour \ud800 painted."])


def test_models_methods_and_openapi(client):
    models = client.get("/v1/models").json()["models"]
    assert [one["name"] for one in models] == ["default"]
    assert models[0]["threshold"] == 0.5 and models[0]["licence"] == "Apache-2.0"
    names = [one["name"] for one in client.get("/v1/methods").json()["methods"]]
    assert "provence" in names
    document = client.get("/openapi.json").json()
    assert document["components"]["schemas"]["PruneRequest"]["examples"][0]["question"]


def test_metrics_count_what_was_done(client):
    ask(client)
    ask(client, 422, top_k=0)
    text = client.get("/metrics").text
    assert 'prunery_requests_total{route="/v1/prune",status="200"}' in text
    assert 'prunery_requests_total{route="/v1/prune",status="422"}' in text
    for name in ("batch_rows_count", "queue_tokens", "tokens_total", "model_load_seconds"):
        assert f'prunery_{name}{{model="default"}}' in text
    assert "process_resident_memory_bytes" in text
