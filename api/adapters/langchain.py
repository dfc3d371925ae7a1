"""LangChain: a document compressor that reranks documents and prunes their sentences."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from .engine import Choice, Engine, OnEmpty, OnError, titles_of


class PruneryCompressor(BaseDocumentCompressor):
    """Gives back the documents by relevance with only the sentences that answer the query.

    Documents are copied: ids and metadata stay, and `relevance_score`, `compression` and
    `kept_spans` (places in the text before) are added to the metadata.

    >>> compressor = PruneryCompressor(threshold=0.3, top_k=5)
    >>> retriever = ContextualCompressionRetriever(
    ...     base_compressor=compressor, base_retriever=base
    ... )
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = Field(
        None, description='"default", a folder or a hub id; with `url`, a name of that service.'
    )
    url: str | None = Field(None, description="A service to ask in place of a model in here.")
    key: SecretStr | None = Field(None, description="The service's API key.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one request.")
    threshold: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=0)
    min_sentences: int = Field(0, ge=0)
    title_key: str | None = Field(None, description="Metadata that holds a document's title.")
    on_empty: OnEmpty = "drop"
    on_error: OnError = "raise"

    _engine: Engine = PrivateAttr()

    def model_post_init(self, context: object, /) -> None:
        """Take the options; nothing is loaded before the first call."""
        self._engine = Engine.of(self, None if self.key is None else self.key.get_secret_value())

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rerank and prune; raises as `ContextPruner.prune` does."""
        texts = [one.page_content for one in documents]
        made = self._engine.prune(
            query, texts, titles_of([one.metadata for one in documents], self.title_key)
        )
        return [_document(documents[one.index], one) for one in made]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """As `compress_documents`, without holding up the event loop."""
        texts = [one.page_content for one in documents]
        made = await self._engine.aprune(
            query, texts, titles_of([one.metadata for one in documents], self.title_key)
        )
        return [_document(documents[one.index], one) for one in made]


def _document(before: Document, one: Choice) -> Document:
    metadata = {**before.metadata, **one.note}
    return Document(page_content=one.text, metadata=metadata, id=before.id)
