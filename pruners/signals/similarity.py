"""Similarity of sentences to their question, by a bi-encoder or a cross-encoder passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import InputError, ModelError
from ..contract import Array, FloatArray
from .context import context_signals


class Encoder(Protocol):
    """Anything that embeds texts; sentence-transformers models do."""

    def encode(self, texts: list[str]) -> Any:
        """Texts to vectors (N, d)."""
        ...


class PairScorer(Protocol):
    """Anything that scores pairs; sentence-transformers' CrossEncoder with raw logits does."""

    def predict(self, pairs: list[tuple[str, str]]) -> Any:
        """(question, text) pairs to raw logits (N,), higher = more relevant."""
        ...


def question_similarity(
    encoder: Encoder, questions: Sequence[str], texts: Sequence[str], question: Array
) -> FloatArray:
    """Cosine of each text to its own question, (N,) float32 in [-1, 1], higher is nearer.

    `question` (N,) int64 is the number of each text's question. Equal texts are encoded once.
    A zero vector has cosine 0 to everything.

    Raises
    ------
    InputError
        `texts` and `question` differ in length, or a number names no question.
    ModelError
        The encoder gave another number of vectors, or one that is not finite.
    """
    asked = _checked(questions, texts, question)
    if not len(asked):
        return np.zeros(0, np.float32)
    distinct = list(dict.fromkeys([*questions, *texts]))
    place = {text: i for i, text in enumerate(distinct)}
    vectors = np.array(encoder.encode(distinct), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(distinct) or not np.isfinite(vectors).all():
        raise ModelError(
            f"the encoder must give {len(distinct)} finite vectors; found shape {vectors.shape}."
        )
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norm == 0, np.float32(1), norm)
    left = vectors[[place[questions[q]] for q in asked]]
    right = vectors[[place[text] for text in texts]]
    cosine: FloatArray = np.einsum("nd,nd->n", left, right)
    return np.clip(cosine, -1.0, 1.0).astype(np.float32)


def cross_encoder_logit(
    scorer: PairScorer, questions: Sequence[str], texts: Sequence[str], question: Array
) -> FloatArray:
    """Raw cross-encoder score of each text with its own question, (N,) float32.

    Equal pairs are scored once. Errors as in `question_similarity`.
    """
    asked = _checked(questions, texts, question)
    pairs = [(questions[q], text) for q, text in zip(asked, texts, strict=True)]
    distinct = list(dict.fromkeys(pairs))
    if not distinct:
        return np.zeros(0, np.float32)
    logits = np.asarray(scorer.predict(distinct), dtype=np.float32).reshape(-1)
    if len(logits) != len(distinct) or not np.isfinite(logits).all():
        raise ModelError(
            f"the cross-encoder must give {len(distinct)} finite logits; found {logits.shape}."
        )
    place = {pair: i for i, pair in enumerate(distinct)}
    return np.asarray(logits[[place[pair] for pair in pairs]], np.float32)


class ProvenceScorer:
    """A Provence network's ranking head as a `PairScorer`: DSLR without another model."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def predict(self, pairs: list[tuple[str, str]]) -> FloatArray:
        """Ranking logit of each pair, (N,) float32."""
        questions = list(dict.fromkeys(question for question, _ in pairs))
        groups: dict[str, list[int]] = {question: [] for question in questions}
        for row, (question, _) in enumerate(pairs):
            groups[question].append(row)
        texts = [[pairs[row][1] for row in groups[question]] for question in questions]
        made = context_signals(self._loaded, questions, texts)
        logits = np.zeros(len(pairs), np.float32)
        logits[[row for question in questions for row in groups[question]]] = made.relevance_logit
        return logits


def _checked(questions: Sequence[str], texts: Sequence[str], question: Array) -> Array:
    asked = np.asarray(question, dtype=np.int64).reshape(-1)
    if len(asked) != len(texts):
        raise InputError(f"{len(texts)} texts were given with {len(asked)} question numbers.")
    if len(asked) and not 0 <= int(asked.min()) <= int(asked.max()) < len(questions):
        raise InputError(f"question numbers must lie in 0..{len(questions) - 1}.")
    return asked
