"""Published checkpoint layouts, read by mapping parameter names; no remote code.

============  =======================================================================
Provence      `deberta.*`, `pooler.dense.*`, `classifier.*` (ranking, 1 logit),
              `token_classifier.*` (2 logits, keep is index 1)
XProvence     `roberta.*` with `roberta.pooler.dense.*`, `classifier.*`, `token_classifier.*`
OpenProvence  `ranking_model.*`, a sequence classifier of `base_model_config` (an older layout
              has these names without the prefix), and `pruning_head.classifier.*` (2 logits)
============  =======================================================================

The layout is told by the parameter names, not by `model_type`. The published weights carry these
licences: Provence CC BY-NC 4.0, XProvence CC BY-NC-ND 4.0, OpenProvence MIT; a `license:` in the
folder's README.md wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...errors import ModelError
from .checkpoint import fill, load_tokenizer, random_encoder, read_tensors
from .config import ProvenceConfig, RankHeadConfig, read_json
from .encoders import weight_files

if TYPE_CHECKING:
    from .provence import Provence

# The keys of an HF config that would make it a config of remote code.
_REMOTE = frozenset({"auto_map", "model_type", "architectures", "transformers_version"})
DEFAULT_THRESHOLD = 0.1


@dataclass(frozen=True)
class _Family:
    """How a base architecture names its encoder and its ranking head.

    `encoder` is the prefix of the encoder's parameters; `names` maps stored prefixes to the
    modules of our `RankHead`.
    """

    encoder: str
    names: Mapping[str, str]
    head: RankHeadConfig = field(default_factory=RankHeadConfig)


_TANH = RankHeadConfig(activation="tanh")
_GELU = RankHeadConfig(activation="gelu")
_POOLED = {"pooler.dense.": "dense.", "classifier.": "out."}
# Sequence classifiers of transformers, by model_type of the base.
_BASES: dict[str, _Family] = {
    "bert": _Family("bert.", {"bert.pooler.dense.": "dense.", "classifier.": "out."}, _TANH),
    "roberta": _Family(
        "roberta.", {"classifier.dense.": "dense.", "classifier.out_proj.": "out."}, _TANH
    ),
    "xlm-roberta": _Family(
        "roberta.", {"classifier.dense.": "dense.", "classifier.out_proj.": "out."}, _TANH
    ),
    "deberta-v2": _Family("deberta.", _POOLED, _GELU),
    "modernbert": _Family(
        "model.", {"head.dense.": "dense.", "head.norm.": "norm.", "classifier.": "out."}
    ),
}
_PROVENCE = _Family("deberta.", _POOLED, _GELU)
_XPROVENCE = _Family("roberta.", {"roberta.pooler.dense.": "dense.", "classifier.": "out."}, _TANH)


def load_published(
    folder: Path, attn_implementation: str | None = None
) -> tuple[Provence, Any, ProvenceConfig]:
    """Network, tokenizer and config of a checkpoint in one of the published layouts.

    Raises ModelError where the names fit none of them, or not all weights are used.
    """
    raw = read_json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    if "pruning_head.classifier.weight" in tensors:
        return _open_provence(folder, raw, tensors, attn_implementation)
    if "token_classifier.weight" in tensors:
        return _naver(folder, raw, tensors, attn_implementation)
    raise ModelError(
        f"{folder}: expected provence.json, or weights named as in Provence, XProvence or "
        f"OpenProvence; found {sorted(tensors)[:4]}...; a plain encoder has no heads yet: train "
        "it with `prunery train provence`"
    )


def _naver(
    folder: Path, raw: Mapping[str, Any], tensors: dict[str, Tensor], attention: str | None
) -> tuple[Provence, Any, ProvenceConfig]:
    """Provence (DeBERTa) or XProvence (XLM-R), by the encoder's prefix."""
    deberta = any(name.startswith("deberta.") for name in tensors)
    family = _PROVENCE if deberta else _XPROVENCE
    base = {k: v for k, v in raw.items() if k not in _REMOTE}
    encoder = _encoder("deberta-v2" if deberta else "xlm-roberta", base, attention, folder)
    config = ProvenceConfig(
        encoder=".",
        threshold=DEFAULT_THRESHOLD,
        max_length=_window(raw, encoder),
        # The published code normalises the question so (known from a port; low trust).
        normalise_question=True,
        licence=_licence(folder, "CC-BY-NC-4.0" if deberta else "CC-BY-NC-ND-4.0"),
        languages=("en",) if deberta else (),
        rank_head=family.head,
        source="provence" if deberta else "xprovence",
    )
    keep = _take(tensors, "token_classifier.")
    return _assemble(folder, encoder, config, family, tensors, keep)


def _open_provence(
    folder: Path, raw: Mapping[str, Any], tensors: dict[str, Tensor], attention: str | None
) -> tuple[Provence, Any, ProvenceConfig]:
    """OpenProvence, with the `ranking_model.` prefix or in the older layout without it."""
    base = raw.get("base_model_config")
    if not isinstance(base, dict) or base.get("model_type") not in _BASES:
        kind = base.get("model_type") if isinstance(base, dict) else base
        raise ModelError(
            f"{folder}/config.json: base_model_config.model_type: expected one of "
            f"{', '.join(sorted(_BASES))}, found {kind!r}"
        )
    kind = str(base["model_type"])
    keep = _take(tensors, "pruning_head.classifier.")
    prefixed = _take(tensors, "ranking_model.")
    tensors = prefixed or tensors
    encoder = _encoder(kind, {k: v for k, v in base.items() if k not in _REMOTE}, attention, folder)
    family = _BASES[kind]
    if kind == "modernbert":
        family = replace(family, head=_modernbert_head(encoder.config))
    config = ProvenceConfig(
        encoder=".",
        threshold=_threshold(raw),
        max_length=_window(raw, encoder),
        token_types=int(getattr(encoder.config, "type_vocab_size", 0) or 0) >= 2,
        licence=_licence(folder, "MIT"),
        rank_head=family.head,
        source="open_provence",
    )
    return _assemble(folder, encoder, config, family, tensors, keep)


def _modernbert_head(config: Any) -> RankHeadConfig:
    """ModernBERT's prediction head: dense, activation, LayerNorm; pooling by its config."""
    if config.classifier_activation != "gelu":
        raise ModelError(
            f"ModernBERT: expected classifier_activation gelu, found {config.classifier_activation}"
        )
    return RankHeadConfig(
        pooling="first" if config.classifier_pooling == "cls" else "mean",
        dense_bias=bool(config.classifier_bias),
        activation="gelu",
        norm=True,
        norm_bias=bool(config.norm_bias),
        norm_eps=float(config.norm_eps),
    )


def _assemble(
    folder: Path,
    encoder: nn.Module,
    config: ProvenceConfig,
    family: _Family,
    tensors: dict[str, Tensor],
    keep: dict[str, Tensor],
) -> tuple[Provence, Any, ProvenceConfig]:
    from .provence import Provence

    model = Provence(encoder, config.rank_head, token_types=config.token_types)
    rank: dict[str, Tensor] = {}
    for stored, own in family.names.items():
        rank |= {own + name: value for name, value in _take(tensors, stored).items()}
    # A pooler that the ranking head does not use (OpenProvence over RoBERTa bases).
    unused = family.encoder + "pooler."
    body = {
        name: value
        for name, value in _take(tensors, family.encoder).items()
        if not (family.encoder + name).startswith(unused)
    }
    if tensors:
        raise ModelError(
            f"{folder}: weights that the layout {config.source} does not have: "
            f"{sorted(tensors)[:5]} ({len(tensors)})"
        )
    fill(model.encoder, body, f"{folder} encoder")
    fill(model.rank_head, rank, f"{folder} ranking head")
    fill(model.keep_head, keep, f"{folder} keep head")
    return model, load_tokenizer(folder), config


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove and give the tensors under a prefix, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name[len(prefix) :]: tensors.pop(name) for name in names}


def _encoder(
    kind: str, values: Mapping[str, Any], attention: str | None, folder: Path
) -> nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(kind, **values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json: not a {kind} config ({error})") from error
    return random_encoder(config, attention)


def _window(raw: Mapping[str, Any], encoder: Any) -> int:
    """Training window: 512 unless the config says otherwise, and never beyond the positions.

    XLM-R numbers positions from padding_idx + 1, so two of its 514 are no positions.
    """
    positions = int(getattr(encoder.config, "max_position_embeddings", 512))
    if encoder.config.model_type in ("xlm-roberta", "roberta"):
        positions -= int(encoder.config.pad_token_id) + 1
    stored = raw.get("max_length")
    return min(int(stored) if isinstance(stored, int) and stored > 20 else 512, positions)


def _threshold(raw: Mapping[str, Any]) -> float:
    """OpenProvence's default; its published configs spell the key `default_threadshold`."""
    for key in ("default_threadshold", "default_threshold"):
        value = raw.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return DEFAULT_THRESHOLD


def _licence(folder: Path, otherwise: str) -> str:
    """`license:` from the front matter of the folder's README.md, else the published one."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*['\"]?([\w.+-]+)", front.group(1), re.M) if front else None
        if found:
            return found.group(1)
    return otherwise
