"""Models that steps use, each read once a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..pruners.models.causal import DType, LoadedCausal, ResolvedCausal
    from ..pruners.models.encoders import ResolvedEncoder
    from ..pruners.models.provence import LoadedProvence


@lru_cache(maxsize=8)
def encoder(name: str) -> ResolvedEncoder:
    """Where an encoder's files are, and the digest of its weights; see `resolve_encoder`."""
    from ..pruners.models.encoders import resolve_encoder

    return resolve_encoder(name)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep a library's own progress bar off the terminal; ours says enough."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class SentenceEncoder:
    """Sentence-transformers behind one method: texts in, unit vectors (N, d) float32 out."""

    def __init__(self, folder: str, device: str | None, dtype: DType = "float32") -> None:
        self._dtype = dtype
        # faiss before torch: two OpenMP runtimes loaded the other way round can crash.
        import faiss  # noqa: F401
        from sentence_transformers import SentenceTransformer

        with without_bars():
            self._model: Any = SentenceTransformer(
                folder,
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype},
            )

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._model.get_embedding_dimension())

    def count_tokens(self, texts: list[str]) -> npt.NDArray[np.int64]:
        """Tokens of each text with its marks (N,) int64, before any cut."""
        if not texts:
            return np.zeros(0, np.int64)
        made = self._model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in made], np.int64)

    def encode(self, texts: list[str], *, batch_size: int = 32) -> npt.NDArray[np.float32]:
        """Unit vectors (N, d) float32; texts beyond the model's window are cut by it."""
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        made = self._model.encode(
            texts,
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        vectors = np.ascontiguousarray(made, dtype=np.float32)
        if self._dtype != "float32":  # its lengths are off by up to half a percent
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


@lru_cache(maxsize=2)
def sentence_encoder(
    folder: str, device: str | None = None, dtype: DType = "float32"
) -> SentenceEncoder:
    """The encoder of a model folder, read once a process."""
    return SentenceEncoder(folder, device, dtype)


@lru_cache(maxsize=2)
def provence(name: str, device: str | None = None, dtype: str = "float32") -> LoadedProvence:
    """A Provence network, read once a process."""
    from ..pruners.models.provence import load_provence

    with without_bars():
        return load_provence(name, device=device, dtype=dtype)


@lru_cache(maxsize=16)
def resolved_causal(name: str) -> ResolvedCausal:
    """Where a causal model's files are, and their digests; see `resolve_causal`."""
    from ..pruners.models.causal import resolve_causal

    return resolve_causal(name)


@lru_cache(maxsize=4)
def causal(name: str, device: str | None = None, dtype: DType = "float32") -> LoadedCausal:
    """A causal model to score with, read once a process; the last four are kept."""
    from ..pruners.models.causal import load_causal

    with without_bars():
        return load_causal(name, device=device, dtype=dtype)
