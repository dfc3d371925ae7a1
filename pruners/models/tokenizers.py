"""Tokenizers of causal models: loading one from a folder, and a digest of what it does.

The digest is taken from the loaded tokenizer, so that a folder, a copy saved from it and the
object in a trainer can be compared. It covers what decides which ids a text becomes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .encoders import HUB_PATTERNS, hub_snapshot

# What a tokenizer needs of a model on the hub: everything but the weights.
_HUB_PATTERNS = tuple(pattern for pattern in HUB_PATTERNS if "safetensors" not in pattern)
# Settings of use, not of the mapping: a trainer may change them on the same tokenizer.
_OF_USE = ("version", "truncation", "padding", "decoder")


def tokenizer_folder(name: str) -> Path:
    """Folder of a tokenizer: `name` itself where it is one, else fetched from the hub.

    Raises ModelError where nothing is found.
    """
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else hub_snapshot(name, _HUB_PATTERNS)


def load_tokenizer(folder: Path | str) -> Any:
    """The fast tokenizer of a model folder.

    Raises ModelError where there is none, or only one without a fast back end: masks need the
    characters that each token covers.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{folder}: expected a folder with a tokenizer (tokenizer.json); found none that"
            f" loads ({type(error).__name__}: {error}). Give the folder of a model or tokenizer."
        ) from error
    check_fast(tokenizer)
    return tokenizer


def check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r}: expected a fast tokenizer (tokenizer.json),"
            f" found {type(tokenizer).__name__}. Convert it with save_pretrained of its fast class."
        )


def tokenizer_sha256(tokenizer: Any, *, marks: bool = False) -> str:
    """Digest of vocabulary, merges, normalisation, splitting and added tokens (64 hex digits).

    Padding, truncation, decoding and the chat template are left out, and so are the tokens put
    around a text unless `marks`: they do not change the ids of a rendered chat.
    """
    check_fast(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in (*_OF_USE, *(() if marks else ("post_processor",))):
        state.pop(name, None)
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def template_sha256(template: Any) -> str:
    """Digest of a chat template: its text, a mapping of names to texts, or None for none."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
