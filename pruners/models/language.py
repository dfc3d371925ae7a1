"""Language models of three kinds: where their files are, what they are, and loading one to ask.

causal models go on with a text, masked ones fill a gap in it, seq2seq ones answer it. All are read
from safetensors by transformers' own classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ...errors import ModelError
from .encoders import HUB_PATTERNS, file_sha256, hub_snapshot, weights_sha256
from .tokenizers import load_tokenizer, template_sha256, tokenizer_sha256

DType = Literal["float32", "bfloat16", "float16"]
Head = Literal["causal", "masked", "seq2seq"]

_CLASSES = {
    "causal": ("AutoModelForCausalLM", "a causal language model"),
    "masked": ("AutoModelForMaskedLM", "a masked language model"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "a sequence-to-sequence language model"),
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A language model on the local disk.

    Attributes
    ----------
    path
        Its folder.
    sha256
        Digest of the weights and of config.json, which holds what else decides the numbers; of a
        seq2seq model of generation_config.json too, which names what an answer starts with.
    tokenizer_sha256, template_sha256
        Digests of its tokenizer and chat template; see `tokenizers`.
    """

    path: Path
    sha256: str
    tokenizer_sha256: str
    template_sha256: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A language model in memory, in eval mode and without gradients, and its tokenizer."""

    model: Any
    tokenizer: Any
    digest: str
    tokenizer_sha256: str
    template_sha256: str
    path: Path


def resolve_language(name: str, head: str, *, marks: bool = True) -> Resolved:
    """Find a language model: a folder, or a hub id from the cache or the network.

    An existing folder wins over a hub id of the same name; HF_HUB_OFFLINE keeps to the cache.
    `marks` puts into the tokenizer's digest the special tokens that it sets around a text.

    Raises ModelError where nothing is found, or the folder lacks safetensors weights, its
    configuration or a tokenizer.
    """
    _class_of(head)
    folder = _folder(name)
    return _resolved(folder, load_tokenizer(folder), head, marks)


def load_language(
    name: str,
    head: str,
    device: str | None = None,
    dtype: DType = "float32",
    *,
    marks: bool = True,
) -> Loaded:
    """Load a language model to score with; `name` and `marks` as for `resolve_language`.

    `head` is causal, masked or seq2seq. `device` None is the GPU where there is one. Only
    safetensors are read, and no code that comes with a model runs.

    Raises ModelError where it cannot be found or read, or weights are missing in its files.
    """
    import transformers

    auto, kind = _class_of(head)
    folder = _folder(name)
    tokenizer = load_tokenizer(folder)
    found = _resolved(folder, tokenizer, head, marks)
    try:
        read: Any = getattr(transformers, auto).from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=getattr(torch, dtype),
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r}: expected {kind} that transformers can build from {folder}; found"
            f" {type(error).__name__}: {error}. Give a model whose architecture this version of"
            " transformers knows, saved by save_pretrained."
        ) from error
    model, info = read
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"model {name!r}: expected weights for every part of {kind} in {folder}; missing or"
            f" of another shape: {', '.join(missing[:5])}. Save the whole model (merge adapters"
            " first), or use it as what it was trained to be."
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(place).eval().requires_grad_(False)
    return Loaded(
        model, tokenizer, found.sha256, found.tokenizer_sha256, found.template_sha256, folder
    )


@lru_cache(maxsize=2)
def kept_language(
    name: str, head: str, device: str | None = None, dtype: DType = "float32"
) -> Loaded:
    """`load_language`, once a process; the last two models are kept."""
    return load_language(name, head, device, dtype)


def _class_of(head: str) -> tuple[str, str]:
    if head not in _CLASSES:
        raise ModelError(f"`head` is one of {', '.join(_CLASSES)}; found {head!r}.")
    return _CLASSES[head]


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


def _resolved(folder: Path, tokenizer: Any, head: str, marks: bool) -> Resolved:
    parts = [weights_sha256(folder), file_sha256(folder / "config.json")]
    start = folder / "generation_config.json"
    if head == "seq2seq" and start.is_file():
        parts.append(file_sha256(start))
    return Resolved(
        folder,
        hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        tokenizer_sha256(tokenizer, marks=marks),
        template_sha256(tokenizer.chat_template),
    )
