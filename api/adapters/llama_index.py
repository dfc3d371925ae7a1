"""LlamaIndex: a node postprocessor that reranks nodes and prunes their sentences."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from .engine import Choice, Engine, OnEmpty, OnError, titles_of


class PruneryPostprocessor(BaseNodePostprocessor):
    """Gives back the nodes by relevance with only the sentences that answer the query.

    Nodes are copied, so that those of an index stay as they are. Ids, relations and metadata
    stay; `relevance_score`, `compression` and `kept_spans` (places in the text before) are added
    to the metadata, and kept out of what models read. The node's score is the relevance; None
    for a node that has none.
    """

    model: str | None = Field(
        default=None,
        description='"default", a folder or a hub id; with `url`, a name of that service.',
    )
    url: str | None = Field(default=None, description="A service to ask instead.")
    key: SecretStr | None = Field(default=None, description="Its API key.", exclude=True)
    timeout: float = Field(default=60.0, gt=0, description="Seconds for one request.")
    threshold: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    min_sentences: int = Field(default=0, ge=0)
    title_key: str | None = Field(default=None, description="Metadata with a node's title.")
    on_empty: OnEmpty = "drop"
    on_error: OnError = "raise"

    _engine: Engine = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take the options; nothing is loaded before the first call."""
        super().model_post_init(context)
        self._engine = Engine.of(self, None if self.key is None else self.key.get_secret_value())

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "PruneryPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question = _question(query_bundle)
        made = self._engine.prune(
            question, _texts(nodes), titles_of([one.node.metadata for one in nodes], self.title_key)
        )
        return [_node(nodes[one.index], one) for one in made]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question = _question(query_bundle)
        made = await self._engine.aprune(
            question, _texts(nodes), titles_of([one.node.metadata for one in nodes], self.title_key)
        )
        return [_node(nodes[one.index], one) for one in made]


def _question(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise ValueError("pruning needs a question: give query_bundle or query_str.")
    return query_bundle.query_str


def _texts(nodes: list[NodeWithScore]) -> list[str]:
    return [one.node.get_content(metadata_mode=MetadataMode.NONE) for one in nodes]


def _node(before: NodeWithScore, one: Choice) -> NodeWithScore:
    node = before.node.model_copy(deep=True)
    node.set_content(one.text)
    node.metadata = {**node.metadata, **one.note}
    for hidden in (node.excluded_llm_metadata_keys, node.excluded_embed_metadata_keys):
        hidden.extend(name for name in one.note if name not in hidden)
    return NodeWithScore(node=node, score=one.relevance)
