"""Saving and loading a Provence network: safetensors, JSON and a tokenizer; nothing executable.

Two kinds of folder, told apart by `provence.json`:

- **adapter** (`lora_rank` > 0): `model.safetensors` holds the low-rank factors and the heads; the
  encoder and its tokenizer come from `encoder`, whose digest is checked.
- **whole** (`encoder` is "."): `model.safetensors` holds encoder and heads; the encoder's
  `config.json` and the tokenizer's files lie beside it.

A folder or hub id without `provence.json` is tried as a published layout (`layouts.py`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import ModelError, PruneryWarning
from .config import CONFIG_NAME, WEIGHTS_NAME, ProvenceConfig, config_to_json, read_config
from .encoders import file_sha256, hub_snapshot, resolve_encoder, weight_files
from .lora import add_lora, fold_lora, set_lora

if TYPE_CHECKING:
    from .provence import Provence

DEFAULT_FOLDER = Path(__file__).parent / "default"
_LOG = logging.getLogger(__name__)
_HEADS = ("rank_head.", "keep_head.")


@dataclass(frozen=True, slots=True)
class LoadedProvence:
    """A network ready to use, in eval mode.

    digest: hex sha256 over the config and the weights' digests; two equal digests mean equal
    decisions, up to arithmetic. tokenizer: a fast Hugging Face tokenizer.
    """

    model: Provence
    tokenizer: Any
    config: ProvenceConfig
    digest: str


def load_provence(
    path_or_id: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> LoadedProvence:
    """Load a network: "default" (shipped here), a folder, or a hub id.

    device: default is CUDA where there is one, else the CPU. dtype: of the encoder ("float32",
    "bfloat16" or a torch dtype; default float32); the heads stay float32. The licence is logged
    at INFO, and warned about where it forbids commercial use.

    Raises ModelError where something is missing, has another digest or another layout.
    """
    folder = _folder(path_or_id)
    if (folder / CONFIG_NAME).is_file():
        config = read_config(folder / CONFIG_NAME)
        model, tokenizer, encoder_sha = _read(folder, config, attn_implementation)
        parts = [
            hashlib.sha256(config_to_json(config).encode()).hexdigest(),
            file_sha256(folder / WEIGHTS_NAME),
            encoder_sha,
        ]
    else:
        from .layouts import load_published

        model, tokenizer, config = load_published(folder, attn_implementation)
        text = config_to_json(replace(config, encoder="."))
        parts = [hashlib.sha256(text.encode()).hexdigest()]
        parts += [file_sha256(file) for file in weight_files(folder)]
    _show_licence(path_or_id, config.licence)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.encoder.to(dtype=_dtype(dtype))
    model.to(place).eval()
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return LoadedProvence(model, tokenizer, config, digest)


def save_provence(
    folder: Path | str,
    *,
    config: ProvenceConfig,
    heads: Mapping[str, Tensor],
    lora: Mapping[str, Tensor] | None = None,
    encoder: nn.Module | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model folder, whole or not at all; an existing folder is replaced.

    Give `lora` factors (an adapter; the config names the encoder and its digest), or `encoder`
    and `tokenizer` (a whole model). `heads` are the `rank_head.*` and `keep_head.*` tensors.
    `dtype` is that of the stored tensors.
    """
    if (lora is None) == (encoder is None):
        raise ModelError("save: expected either `lora` factors or a whole `encoder`")
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tensors = {name: value for name, value in heads.items() if name.startswith(_HEADS)}
        if lora is not None:
            tensors |= {f"lora.{name}": value for name, value in lora.items()}
        elif encoder is not None:
            config = replace(config, encoder=".", encoder_sha256="", lora_rank=0, lora_alpha=0.0)
            tensors |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
            encoder.config.save_pretrained(work)  # type: ignore[union-attr,operator]
            tokenizer.save_pretrained(work)
        _write(work / WEIGHTS_NAME, tensors, dtype)
        (work / CONFIG_NAME).write_text(config_to_json(config), encoding="utf-8")
        work.chmod(0o755)
        _swap(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    plain = {
        name: (value.detach().to("cpu", dtype) if value.is_floating_point() else value.cpu())
        .contiguous()
        .clone()
        for name, value in sorted(tensors.items())
    }
    for name, value in plain.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"save {name}: expected finite weights in {dtype}, found NaN or infinity; "
                "lower the learning rate, or store as float32"
            )
    save_file(plain, path)
    path.chmod(0o644)


def _swap(work: Path, target: Path) -> None:
    """Put a finished folder in place of an old one of the same name, if there is one."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old / "old")
        os.replace(work, target)
        shutil.rmtree(old)
    else:
        os.replace(work, target)


def _folder(path_or_id: str) -> Path:
    if path_or_id == "default":
        if not (DEFAULT_FOLDER / WEIGHTS_NAME).is_file():
            raise ModelError(
                f"default model: expected {DEFAULT_FOLDER / WEIGHTS_NAME}, found none; "
                "the installation is incomplete: install prunery again"
            )
        return DEFAULT_FOLDER
    folder = Path(path_or_id).expanduser()
    return folder if folder.is_dir() else hub_snapshot(path_or_id)


def _read(
    folder: Path, config: ProvenceConfig, attn_implementation: str | None
) -> tuple[Provence, Any, str]:
    tensors = read_tensors(folder / WEIGHTS_NAME)
    source, encoder_sha = encoder_source(folder, config)
    if config.lora_rank:
        encoder = pretrained_encoder(source, attn_implementation)
        fold_lora(encoder, _part(tensors, "lora."), config.lora_rank, config.lora_alpha)
    else:
        encoder = empty_encoder(source, attn_implementation)
    model = new_network(encoder, config)
    if not config.lora_rank:
        fill(model.encoder, _part(tensors, "encoder."), str(folder))
    fill_heads(model, tensors, str(folder))
    return model, load_tokenizer(source), encoder_sha


def encoder_source(folder: Path, config: ProvenceConfig) -> tuple[Path, str]:
    """Folder of a checkpoint's encoder, its digest checked; ("." itself, "") for a whole one."""
    if config.encoder == ".":
        return folder, ""
    own = folder / config.encoder
    name = str(own) if own.is_dir() else config.encoder
    found = resolve_encoder(name, sha256=config.encoder_sha256 or None)
    return found.path, found.sha256


def resume_lora(folder: Path, model: Provence, config: ProvenceConfig, seed: int) -> None:
    """Put a stored adapter's factors and heads into a fresh network, unfolded, to train on."""
    tensors = read_tensors(folder / WEIGHTS_NAME)
    add_lora(model.encoder, config.lora_rank, config.lora_alpha, seed=seed)
    set_lora(model.encoder, _part(tensors, "lora."))
    fill_heads(model, tensors, str(folder))


def new_network(encoder: nn.Module, config: ProvenceConfig) -> Provence:
    """A network with fresh heads over an encoder."""
    from .provence import Provence

    return Provence(encoder, config.rank_head, token_types=config.token_types)


def pretrained_encoder(source: Path, attn_implementation: str | None = None) -> nn.Module:
    """The encoder of a folder with its weights, float32, dropout off until trained."""
    from transformers import AutoModel

    with _quiet():
        model: nn.Module = AutoModel.from_pretrained(
            source,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            **_attention(attn_implementation),
        )
    return model


def empty_encoder(source: Path, attn_implementation: str | None = None) -> nn.Module:
    """The encoder that a folder's config.json describes, without its weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return random_encoder(config, attn_implementation)


def random_encoder(config: Any, attn_implementation: str | None = None) -> nn.Module:
    """An encoder of a transformers config with random float32 weights, to be filled."""
    from transformers import AutoModel

    build: Any = AutoModel
    model: nn.Module = build.from_config(config, **_attention(attn_implementation))
    return model.float()


def load_tokenizer(source: Path) -> Any:
    """The fast tokenizer of a folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: expected the files of a tokenizer ({error}); put tokenizer.json there"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{source}: expected a fast tokenizer; put its tokenizer.json there")
    return tokenizer


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, or a ModelError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: expected a safetensors file ({error}); fetch it again"
        ) from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that has to fit exactly; position buffers of old releases are ignored."""
    wanted = module.state_dict()
    given = {k: v for k, v in tensors.items() if k in wanted or not _is_buffer(k)}
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    missing = [name for name in missing if not _is_buffer(name)]
    if missing or extra:
        raise ModelError(
            f"{where}: weights do not fit the network: missing {missing[:5]} ({len(missing)}), "
            f"unexpected {extra[:5]} ({len(extra)}); it has another layout or is incomplete"
        )
    for name, value in given.items():
        if value.shape != wanted[name].shape:
            raise ModelError(
                f"{where}: {name}: expected shape {tuple(wanted[name].shape)}, "
                f"found {tuple(value.shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"{where}: {name}: expected finite weights, found NaN or infinity")
    module.load_state_dict(dict(given), strict=False)


def fill_heads(model: Provence, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load `rank_head.*` and `keep_head.*` into the heads, in float32."""
    fill(model.rank_head, _part(tensors, "rank_head."), where)
    fill(model.keep_head, _part(tensors, "keep_head."), where)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in ("position_ids", "token_type_ids", "inv_freq")


def _attention(implementation: str | None) -> dict[str, str]:
    return {"attn_implementation": implementation} if implementation else {}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype or "float32", None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype: expected float32, bfloat16 or float16, found {dtype!r}")
    return found


def _show_licence(name: str, licence: str) -> None:
    _LOG.info("model %s: licence %s", name, licence)
    plain = licence.lower().replace("_", "-")
    if "-nc" in plain or "noncommercial" in plain or "non-commercial" in plain:
        warnings.warn(
            f"model {name}: its licence ({licence}) forbids commercial use",
            PruneryWarning,
            stacklevel=3,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and its report of the pooler's weights, which are not used."""
    from transformers.utils import logging as untyped

    hf_logging: Any = untyped
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
