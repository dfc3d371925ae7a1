"""Causal language models to score tokens with; see `language` for how they are found and read."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ModelError
from .language import DType, Loaded, Resolved, load_language, resolve_language

__all__ = ["DType", "LoadedCausal", "ResolvedCausal", "load_causal", "resolve_causal"]

ResolvedCausal = Resolved


@dataclass(frozen=True, slots=True)
class LoadedCausal(Loaded):
    """A causal model in memory, in eval mode and without gradients, and its tokenizer."""

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
    The tokens that a tokenizer sets around a text are no part of its digest here: rendered
    chats bring their own.

    Raises ModelError where nothing is found, or the folder lacks safetensors weights, its
    configuration or a tokenizer.
    """
    return resolve_language(name, "causal", marks=False)


def load_causal(name: str, *, device: str | None = None, dtype: DType = "float32") -> LoadedCausal:
    """Load a causal model to score with; `name` as for `resolve_causal`.

    `device` None is the GPU where there is one. Only safetensors are read, and no code that
    comes with a model runs.

    Raises ModelError where it cannot be found or read, or weights are missing in its files.
    """
    found = load_language(name, "causal", device, dtype, marks=False)
    return LoadedCausal(
        found.model,
        found.tokenizer,
        found.digest,
        found.tokenizer_sha256,
        found.template_sha256,
        found.path,
    )
