"""Small random checkpoints in the published layouts, against hand-assembled networks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from prunery.errors import ModelError, PruneryWarning
from prunery.pruners.models.provence import LoadedProvence, load_provence

from .tiny import WORDS, bert_config, pair, tokenizer

SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}


def deberta() -> DebertaV2Config:
    return DebertaV2Config(
        **SMALL,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        pooler_hidden_size=16,
        pooler_hidden_act="gelu",
        num_labels=1,
    )


def modernbert(**changed: object) -> ModernBertConfig:
    return ModernBertConfig(
        **SMALL,
        num_labels=1,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        **changed,
    )


def write(folder: Path, config: dict[str, object], state: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    tokenizer().save_pretrained(folder)
    return str(folder)


def inputs() -> dict[str, torch.Tensor]:
    return {k: v for k, v in pair().items() if k != "token_type_ids"}


def keep_head() -> nn.Linear:
    head = nn.Linear(16, 2)
    nn.init.normal_(head.weight)
    return head


def check(
    loaded: LoadedProvence, rank: torch.Tensor, hidden: torch.Tensor, head: nn.Linear
) -> None:
    out = loaded.model(**pair())
    torch.testing.assert_close(out.rank_logit, rank)
    real = pair()["attention_mask"].bool()
    want = torch.softmax(head(hidden), -1)[..., 1]
    torch.testing.assert_close(torch.sigmoid(out.keep_logit)[real], want[real])


def test_provence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, head = DebertaV2ForSequenceClassification(deberta()).eval(), keep_head()
    state = model.state_dict() | {f"token_classifier.{k}": v for k, v in head.state_dict().items()}
    config = model.config.to_dict() | {
        "model_type": "Provence",
        "auto_map": {"AutoModel": "modeling_provence.Provence"},
    }
    path = write(tmp_path / "m", config, state)
    with pytest.warns(PruneryWarning, match="CC-BY-NC-4.0"):
        loaded = load_provence(path, device="cpu")
    with torch.no_grad():
        rank = model(**inputs()).logits[:, 0]
        hidden = model.deberta(**inputs()).last_hidden_state
        check(loaded, rank, hidden, head)
    assert loaded.config.source == "provence"
    assert loaded.config.normalise_question
    assert not loaded.config.token_types
    assert loaded.config.max_length == 66


def test_xprovence(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = XLMRobertaConfig(**(SMALL | {"pad_token_id": 1}), type_vocab_size=1)
    model, rank_head, head = XLMRobertaModel(config).eval(), nn.Linear(16, 1), keep_head()
    state = {f"roberta.{k}": v for k, v in model.state_dict().items()}
    state |= {f"classifier.{k}": v for k, v in rank_head.state_dict().items()}
    state |= {f"token_classifier.{k}": v for k, v in head.state_dict().items()}
    path = write(tmp_path / "m", config.to_dict() | {"model_type": "XProvence"}, state)
    with pytest.warns(PruneryWarning, match="NC-ND"):
        loaded = load_provence(path, device="cpu")
    with torch.no_grad():
        out = model(**inputs())
        check(loaded, rank_head(out.pooler_output)[:, 0], out.last_hidden_state, head)
    assert loaded.config.source == "xprovence"
    assert loaded.config.pair == "cls_q_sep_p_sep"
    assert loaded.config.max_length == 64  # two of the 66 positions are no positions


def open_provence(
    folder: Path, model: nn.Module, head: nn.Linear, *, prefix: str, **extra: object
) -> str:
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    state |= {f"pruning_head.classifier.{k}": v for k, v in head.state_dict().items()}
    config = {
        "model_type": "open_provence",
        "base_model_config": model.config.to_dict(),
        "pruning_config": {"classifier_dropout": 0.1, "num_pruning_labels": 2},
        **extra,
    }
    return write(folder, config, state)


@pytest.mark.parametrize("prefix", ["ranking_model.", ""])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_open_provence_modernbert(tmp_path: Path, prefix: str, pooling: str) -> None:
    torch.manual_seed(2)
    model = ModernBertForSequenceClassification(modernbert(classifier_pooling=pooling)).eval()
    nn.init.normal_(model.head.norm.weight)
    head = keep_head()
    path = open_provence(tmp_path / "m", model, head, prefix=prefix, default_threadshold=0.05)
    loaded = load_provence(path, device="cpu")
    with torch.no_grad():
        rank = model(**inputs()).logits[:, 0]
        check(loaded, rank, model.model(**inputs()).last_hidden_state, head)
    assert loaded.config.threshold == 0.05
    assert loaded.config.licence == "MIT"
    assert loaded.config.source == "open_provence"


def test_open_provence_over_xlm_roberta_and_bert_and_deberta(tmp_path: Path) -> None:
    torch.manual_seed(3)
    roberta = XLMRobertaConfig(**(SMALL | {"pad_token_id": 1}), type_vocab_size=1, num_labels=1)
    models = {
        "roberta": XLMRobertaForSequenceClassification(roberta),
        "deberta": DebertaV2ForSequenceClassification(deberta()),
        "bert": BertForSequenceClassification(bert_config(num_labels=1)),
    }
    for name, model in models.items():
        model.eval()
        head = keep_head()
        path = open_provence(
            tmp_path / name, model, head, prefix="ranking_model.", default_threshold=0.2
        )
        loaded = load_provence(path, device="cpu")
        given = pair() if name == "bert" else inputs()
        with torch.no_grad():
            rank = model(**given).logits[:, 0]
            check(loaded, rank, getattr(model, name)(**given).last_hidden_state, head)
        assert loaded.config.threshold == 0.2
        assert loaded.config.token_types == (name == "bert")


def test_a_licence_in_the_card_wins(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = ModernBertForSequenceClassification(modernbert())
    path = open_provence(tmp_path / "m", model, keep_head(), prefix="ranking_model.")
    (tmp_path / "m" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# x\n")
    loaded = load_provence(path, device="cpu")
    assert loaded.config.licence == "apache-2.0"
    assert loaded.config.threshold == 0.1


def test_incomplete_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = ModernBertForSequenceClassification(modernbert())
    path = open_provence(tmp_path / "m", model, keep_head(), prefix="ranking_model.")
    file = Path(path) / "model.safetensors"
    good = load_file(file)
    save_file({k: v for k, v in good.items() if "layers.1" not in k}, file)
    with pytest.raises(ModelError, match="missing"):
        load_provence(path, device="cpu")
    save_file(good | {"ranking_model.extra.weight": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"extra\.weight"):
        load_provence(path, device="cpu")
    save_file({k: v for k, v in good.items() if "pruning_head" not in k}, file)
    with pytest.raises(ModelError, match="a plain encoder has no heads"):
        load_provence(path, device="cpu")
    config = json.loads((Path(path) / "config.json").read_text())
    config["base_model_config"]["model_type"] = "gpt2"
    (Path(path) / "config.json").write_text(json.dumps(config))
    save_file(good, file)
    with pytest.raises(ModelError, match="gpt2"):
        load_provence(path, device="cpu")
