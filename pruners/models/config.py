"""What is stored beside the weights of a Provence network, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import ModelError

FORMAT_VERSION = 1
CONFIG_NAME = "provence.json"
WEIGHTS_NAME = "model.safetensors"

Aggregation = Literal["mean", "vote"]
PairLayout = Literal["cls_q_sep_p_sep", "cls_q_sep_sep_p_sep"]
Pooling = Literal["first", "mean"]
Activation = Literal["tanh", "gelu", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHeadConfig:
    """Shape of the ranking head: pooling, an optional dense layer, one output logit.

    pooling
        "first" takes the first token's hidden state, "mean" the mean over real tokens.
    dense, dense_bias, activation, norm
        dense layer (H, H) after pooling, its bias, the function after it, and a LayerNorm after
        that. BERT and XLM-R poolers: tanh. DeBERTa's: gelu. ModernBERT's: gelu, norm, no bias.
    """

    pooling: Pooling = "first"
    dense: bool = True
    dense_bias: bool = True
    activation: Activation = "tanh"
    norm: bool = False
    norm_bias: bool = True
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenceConfig:
    """Everything that inference needs to know about a checkpoint, apart from its weights.

    encoder
        Name, hub id or path of the encoder; "." where the encoder lies in the same folder.
    encoder_sha256
        Digest of the encoder's model.safetensors, checked at load; empty for encoder ".".
    threshold
        Default keep threshold on the sentence score, 0..1, strict (kept iff score > threshold).
    aggregation
        "mean" keep probability of a sentence's tokens, or "vote" (share of tokens above it).
    max_length
        Tokens in one window, special tokens included.
    pair
        "cls_q_sep_p_sep": one separator between question and passage, for every tokenizer;
        "cls_q_sep_sep_p_sep": the two of RoBERTa's own pair format.
    token_types
        Whether question and passage get token types 0 and 1 (BERT) or all 0.
    title_join
        "sentence": the title is the first sentence of the passage, tokenised like the others.
    normalise_question
        Lower-case the question and strip ASCII punctuation before encoding.
    licence, languages
        SPDX name of the weights' licence; ISO 639-1 codes of the training languages.
    lora_rank, lora_alpha
        0 where the encoder's weights are stored whole; else the file holds the low-rank factors,
        and W + alpha / rank * B A is formed at load.
    """

    encoder: str
    encoder_sha256: str = ""
    threshold: float = 0.1
    aggregation: Aggregation = "mean"
    max_length: int = 512
    pair: PairLayout = "cls_q_sep_p_sep"
    token_types: bool = False
    title_join: Literal["sentence"] = "sentence"
    normalise_question: bool = False
    licence: str = "unknown"
    languages: tuple[str, ...] = ()
    rank_head: RankHeadConfig = field(default_factory=RankHeadConfig)
    lora_rank: int = 0
    lora_alpha: float = 0.0
    format_version: int = FORMAT_VERSION
    source: str = "prunery"

    def __post_init__(self) -> None:
        """Refuse values that no checkpoint can mean."""
        _member("aggregation", self.aggregation, get_args(Aggregation))
        _member("pair", self.pair, get_args(PairLayout))
        _member("title_join", self.title_join, ("sentence",))
        _member("rank_head.pooling", self.rank_head.pooling, get_args(Pooling))
        _member("rank_head.activation", self.rank_head.activation, get_args(Activation))
        if not 0.0 <= self.threshold <= 1.0:
            raise ModelError(f"threshold: expected 0..1, found {self.threshold}; fix the config")
        if self.max_length < 8:
            raise ModelError(f"max_length: expected >= 8 tokens, found {self.max_length}")
        if self.lora_rank < 0:
            raise ModelError(f"lora_rank: expected >= 0, found {self.lora_rank}")


def _member(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def config_to_json(config: ProvenceConfig) -> str:
    """The config as indented JSON text with sorted keys."""
    return json.dumps(asdict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def config_from_mapping(raw: Mapping[str, Any], where: str) -> ProvenceConfig:
    """A config from parsed JSON; unknown, missing and newer-format content is refused."""
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{where}: expected format_version {FORMAT_VERSION}, found {version!r}; "
            "load it with the release of prunery that wrote it, or train it again"
        )
    known = {f.name for f in fields(ProvenceConfig)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ModelError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
    values = dict(raw)
    try:
        values["rank_head"] = RankHeadConfig(**values.get("rank_head", {}))
        values["languages"] = tuple(values.get("languages", ()))
        return ProvenceConfig(**values)
    except TypeError as error:
        raise ModelError(f"{where}: not a Provence config ({error})") from error


def read_config(path: Path) -> ProvenceConfig:
    """Read `provence.json`; a ModelError says what is wrong with it."""
    return config_from_mapping(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, or a ModelError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: expected a readable JSON object ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw
