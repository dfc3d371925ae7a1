"""Causal language models: where their files are, what they are, and loading one to score with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ...errors import ModelError
from .encoders import HUB_PATTERNS, file_sha256, hub_snapshot, weights_sha256
from .tokenizers import load_tokenizer, template_sha256, tokenizer_sha256

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class ResolvedCausal:
    """A causal model on the local disk.

    Attributes
    ----------
    path
        Its folder.
    sha256
        Digest of the weights and of config.json, which holds what else decides the numbers.
    tokenizer_sha256, template_sha256
        Digests of its tokenizer and chat template; see `tokenizers`.
    """

    path: Path
    sha256: str
    tokenizer_sha256: str
    template_sha256: str


@dataclass(frozen=True, slots=True)
class LoadedCausal:
    """A causal model in memory, in eval mode and without gradients, and its tokenizer."""

    model: Any
    tokenizer: Any
    digest: str
    tokenizer_sha256: str
    template_sha256: str
    path: Path

    @property
    def start(self) -> int:
        """Id that stands before a text without a prompt: begin-, else end-of-sequence."""
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        raise ModelError(
            f"{self.path}: expected a tokenizer with a begin- or end-of-sequence token, which an"
            " answer without its prompt has to start with; found neither. Add one to"
            " tokenizer_config.json."
        )


def resolve_causal(name: str) -> ResolvedCausal:
    """Find a causal model: a folder, or a hub id from the cache or the network.

    An existing folder wins over a hub id of the same name; HF_HUB_OFFLINE keeps to the cache.

    Raises ModelError where nothing is found, or the folder lacks safetensors weights, its
    configuration or a tokenizer.
    """
    folder = _folder(name)
    return _resolved(folder, load_tokenizer(folder))


def load_causal(name: str, *, device: str | None = None, dtype: DType = "float32") -> LoadedCausal:
    """Load a causal model to score with; `name` as for `resolve_causal`.

    `device` None is the GPU where there is one. Only safetensors are read, and no code that
    comes with a model runs.

    Raises ModelError where it cannot be found or read, or weights are missing in its files.
    """
    from transformers import AutoModelForCausalLM

    folder = _folder(name)
    tokenizer = load_tokenizer(folder)
    found = _resolved(folder, tokenizer)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=getattr(torch, dtype),
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r}: expected a causal language model that transformers can build from"
            f" {folder}; found {type(error).__name__}: {error}. Give a model whose architecture"
            " this version of transformers knows, saved by save_pretrained."
        ) from error
    model, info = read
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"model {name!r}: expected weights for every part in {folder}; missing or of another"
            f" shape: {', '.join(missing[:5])}. Save the whole model (merge adapters first)."
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(place).eval().requires_grad_(False)
    return LoadedCausal(
        model, tokenizer, found.sha256, found.tokenizer_sha256, found.template_sha256, folder
    )


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = hub_snapshot(name, (*HUB_PATTERNS, "*.jinja"))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name!r}: expected config.json in {folder}, found none. Give the folder that"
            " save_pretrained wrote; adapters alone have to be merged into their model first."
        )
    return folder


def _resolved(folder: Path, tokenizer: Any) -> ResolvedCausal:
    parts = [weights_sha256(folder), file_sha256(folder / "config.json")]
    return ResolvedCausal(
        folder,
        hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        tokenizer_sha256(tokenizer),
        template_sha256(tokenizer.chat_template),
    )
