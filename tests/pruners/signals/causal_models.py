"""Tiny random causal models of several makes, and rows to score."""

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED = {"sliding_window": 4, "query_pre_attn_scalar": 5}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gemma2": lambda: Gemma2Config(
        **_SIZES, **_WINDOWED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES,
        **_WINDOWED,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "cohere": lambda: CohereConfig(**_SIZES, logit_scale=0.3),
    "granite": lambda: GraniteConfig(
        **_SIZES, logits_scaling=2.5, embedding_multiplier=3.0, attention_multiplier=0.4
    ),
}


def tiny_model(name: str, attn_implementation: str = "sdpa", seed: int = 0, spread: float = 0.3):
    """A random model whose weights are spread enough that its distributions differ."""
    torch.manual_seed(seed)
    if name == "gemma2":  # its soft cap has no SDPA
        attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation=attn_implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread)
    return model.eval()


def rows(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random rows of those lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(found: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of rows padded on one side."""
    width = max(len(row) for row in found)
    ids = torch.zeros(len(found), width, dtype=torch.int64)
    mask = torch.zeros(len(found), width, dtype=torch.int64)
    for i, row in enumerate(found):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
