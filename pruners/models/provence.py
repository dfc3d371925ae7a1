"""The Provence network: one encoder, a ranking head and a keep head in one forward pass.

Provence (arXiv:2501.16214, section 3): the encoder reads question and passage together; the
ranking head gives one logit for the passage, the keep head two logits a token. Trained weights
are safetensors plus `provence.json`; nothing here reads pickles or runs remote code.

Departure: the paper builds on DeBERTa-v3-large with its context pooler; here the encoder is any
Hugging Face encoder and the ranking head's shape is an option (`RankHeadConfig`).
"""

from __future__ import annotations

import string
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import RankHeadConfig

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ProvenceOutput(NamedTuple):
    """What one forward pass gives.

    rank_logit
        (B,) float, raw logit; higher is more relevant; sigmoid gives 0..1.
    keep_logit
        (B, T) float, logit(keep) - logit(drop) of every token, so that sigmoid gives the keep
        probability (the softmax's second column). Question, special and padding tokens have
        values too; they mean nothing.
    """

    rank_logit: Tensor
    keep_logit: Tensor


class RankHead(nn.Module):
    """Pooling -> (dense -> activation -> norm) -> one logit; see `RankHeadConfig`."""

    def __init__(self, hidden: int, config: RankHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(hidden, hidden, bias=config.dense_bias) if config.dense else None
        self.norm = (
            nn.LayerNorm(hidden, eps=config.norm_eps, bias=config.norm_bias)
            if config.norm
            else None
        )
        self.out = nn.Linear(hidden, 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (B, T, H) and mask (B, T) to logits (B,)."""
        if self.config.pooling == "first":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.to(hidden.dtype)[..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.from_pooled(pooled)

    def from_pooled(self, pooled: Tensor) -> Tensor:
        """Pooled states (B, H) to logits (B,), for callers that pool themselves."""
        if self.dense is not None:
            pooled = self.dense(pooled)
            if self.config.activation == "tanh":
                pooled = torch.tanh(pooled)
            elif self.config.activation == "gelu":
                pooled = nn.functional.gelu(pooled)
        if self.norm is not None:
            pooled = self.norm(pooled)
        return self.out(pooled)[..., 0]  # type: ignore[no-any-return]


class Provence(nn.Module):
    """Encoder, ranking head and keep head.

    `encoder` is any module that takes input_ids, attention_mask and, where `token_types`,
    token_type_ids, and gives `.last_hidden_state` (B, T, H). A pooler of its own is removed: the
    ranking head has one. The heads may stay float32 under an encoder in bfloat16: hidden states
    are converted to the heads' dtype.
    """

    def __init__(
        self, encoder: nn.Module, rank_head: RankHeadConfig, *, token_types: bool = False
    ) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # type: ignore[assignment]
        hidden = int(encoder.config.hidden_size)  # type: ignore[union-attr,arg-type]
        self.encoder = encoder
        self.token_types = token_types
        self.rank_head = RankHead(hidden, rank_head)
        self.keep_head = nn.Linear(hidden, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> ProvenceOutput:
        """(B, T) ids, mask and token types (ignored by encoders without them) to both logits."""
        extra: dict[str, Any] = {}
        if self.token_types and token_type_ids is not None:
            extra["token_type_ids"] = token_type_ids
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **extra
        ).last_hidden_state
        return self.heads(hidden, attention_mask)

    def heads(self, hidden: Tensor, attention_mask: Tensor) -> ProvenceOutput:
        """Both heads over hidden states (B, T, H) that a caller computed with `.encoder`."""
        hidden = hidden.to(self.keep_head.weight.dtype)
        keep = self.keep_head(hidden)
        return ProvenceOutput(self.rank_head(hidden, attention_mask), keep[..., 1] - keep[..., 0])


def normalise_question(question: str) -> str:
    """Lower-case, ASCII punctuation removed, whitespace collapsed (the published checkpoints).

    Applied only where a checkpoint's config says so (`normalise_question`).
    """
    return " ".join(question.lower().translate(_DROP_PUNCTUATION).split())


def has_token_types(encoder_config: Any) -> bool:
    """Whether an encoder tells two segments apart (a token type table of two rows or more)."""
    return int(getattr(encoder_config, "type_vocab_size", 0) or 0) >= 2


from .checkpoint import (  # noqa: E402  checkpoint builds on the classes above
    LoadedProvence,
    load_provence,
    save_provence,
)

__all__ = [
    "LoadedProvence",
    "Provence",
    "ProvenceOutput",
    "RankHead",
    "has_token_types",
    "load_provence",
    "normalise_question",
    "save_provence",
]
