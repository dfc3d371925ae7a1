"""Input embeddings of a model, read without running it: a vector for each word.

The published vector of a word is the mean of the rows of its pieces in the matrix of input
embeddings (ClaPS, arXiv 2310.12774). The matrix alone is read from the safetensors, so a model
that does not fit into memory can be asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, ModelError
from ..contract import FloatArray
from .encoders import PACKAGED_ALIASES, resolve_encoder, weight_files
from .tokenizers import load_tokenizer, tokenizer_folder


def tokenizer_home(name: str) -> Path:
    """Folder of the tokenizer of a model: `name` is a folder, a hub id or the packaged encoder.

    Raises ModelError where nothing is found.
    """
    packaged = name in PACKAGED_ALIASES and not Path(name).is_dir()
    return transformer_home(resolve_encoder(name).path if packaged else tokenizer_folder(name))


def transformer_home(folder: Path) -> Path:
    """The folder of the network: a sentence-transformers folder may hold it one level down."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return folder
    try:
        below = str(json.loads(listed.read_text("utf-8"))[0]["path"])
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{listed}: expected sentence-transformers' list of modules, found {error!r}. Fetch"
            " the model again."
        ) from error
    inner = (folder / below).resolve()
    return inner if inner.is_dir() and inner.is_relative_to(folder.resolve()) else folder


def has_token_rows(folder: Path) -> bool:
    """Whether a folder holds a network of transformers, which has input embeddings.

    sentence-transformers also knows tables of static vectors and bags of words.
    """
    config = transformer_home(folder) / "config.json"
    try:
        return bool(json.loads(config.read_text("utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return False


def token_vectors(folder: Path, words: Sequence[str]) -> FloatArray:
    """Mean input embedding of the pieces of each word, (N, d) float32.

    A word is cut up as it is inside of a sentence: with a space before it where that makes fewer
    pieces (byte-level BPE). The reference encodes it alone, which for GPT-2 and RoBERTa is
    another token than the one in the vocabulary.

    Raises
    ------
    InputError
        A word has no piece.
    ModelError
        The matrix cannot be found, or holds numbers that are not finite.
    """
    home = transformer_home(folder)
    rows = input_embeddings(home)
    tokenizer = load_tokenizer(home)
    made = np.zeros((len(words), rows.shape[1]), np.float32)
    for place, pieces in enumerate(_pieces(tokenizer, words)):
        if not pieces or max(pieces) >= len(rows):
            raise InputError(
                f"word {words[place]!r}: expected pieces that the model at {folder} has rows for,"
                f" found {pieces}. Leave the word out, or cluster with `vectors: encoder`."
            )
        # float64, so that the mean does not hang on the order of the pieces.
        made[place] = rows[pieces].astype(np.float64).mean(axis=0)
    return made


def _pieces(tokenizer: Any, words: Sequence[str]) -> Iterator[list[int]]:
    if not words:
        return
    alone = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    spaced = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    for first, second in zip(alone, spaced, strict=True):
        yield second if 0 < len(second) < len(first) or not first else first


def input_embeddings(folder: Path) -> FloatArray:
    """The matrix of input embeddings of a model folder, (V, d) float32.

    Its name is looked up in the model's class, built without weights; where the files hold no
    tensor of that name and shape, the whole model is read.

    Raises
    ------
    ModelError
        There is no such model, or its numbers are not finite.
    """
    names, shape = _names(folder)
    found = _stored(folder, names, shape)
    made = _loaded(folder) if found is None else found
    if not np.isfinite(made).all():
        raise ModelError(
            f"{folder}: expected finite input embeddings, found others. Use another model."
        )
    return made


def _names(folder: Path) -> tuple[list[str], tuple[int, ...]]:
    """Every name of the matrix in the model's class, and its shape."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        build: Any = AutoModel.from_config
        with torch.device("meta"):
            model = build(config, trust_remote_code=False)
        weight = model.get_input_embeddings().weight
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: expected a model with input embeddings that transformers can build, found"
            f" {type(error).__name__}: {error}. Cluster with `vectors: encoder` instead."
        ) from error
    own = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    prefix = getattr(model, "base_model_prefix", "")
    return [*own, *(f"{prefix}.{name}" for name in own if prefix)], tuple(weight.shape)


def _stored(folder: Path, names: Sequence[str], shape: tuple[int, ...]) -> FloatArray | None:
    """The tensor of one of those names and that shape, if the files hold it."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for name in names:
                if name not in tensors.keys():  # noqa: SIM118  not a mapping
                    continue
                if tuple(tensors.get_slice(name).get_shape()) == shape:
                    return np.asarray(tensors.get_tensor(name).float().numpy(), np.float32)
    return None


def _loaded(folder: Path) -> FloatArray:
    from transformers import AutoModel

    try:
        model: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder}: expected weights that transformers can read, found"
            f" {type(error).__name__}: {error}. Cluster with `vectors: encoder` instead."
        ) from error
    weight = model.get_input_embeddings().weight
    return np.asarray(weight.detach().float().cpu().numpy(), np.float32)
