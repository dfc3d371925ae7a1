"""Tiny encoders and tokenizers on disk, so that loading is tested without a download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.?"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, BERT's special tokens."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(r"", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def bert_config(**changed: object) -> BertConfig:
    """Two layers of 16, 64 positions."""
    values = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return BertConfig(**(values | changed))


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT with its tokenizer."""
    torch.manual_seed(seed)
    BertModel(bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pair() -> dict[str, torch.Tensor]:
    """Two padded pairs in BERT's layout, with token types."""
    ids = torch.tensor([[2, 5, 6, 3, 7, 8, 9, 3], [2, 6, 3, 10, 11, 3, 0, 0]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "token_type_ids": types,
    }
