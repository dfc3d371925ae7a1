"""Small random models of every architecture that can be compressed, saved as users have them."""

from pathlib import Path

import torch

VOCABULARY = 300
_LLAMA = dict(  # noqa: C408
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
# name: (config class, model class, options)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(  # noqa: C408
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        dict(  # noqa: C408
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        dict(  # noqa: C408
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=2,
        ),
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
        },
    ),
}


def tiny_config(name: str, **changes):
    """Configuration of an architecture with some values changed."""
    import transformers

    config, _, options = ARCHITECTURES[name]
    return getattr(transformers, config)(**{**options, **changes})


def tiny_model(name: str, *, seed: int = 0, **changes):
    """A random model whose weights are large enough for its outputs to differ."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, ARCHITECTURES[name][1])(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_tokenizer():
    """A byte-level tokenizer of at most VOCABULARY entries."""
    from prunery.pipelines.train_lm import train_tokenizer

    return train_tokenizer(["a few words to learn from"], VOCABULARY)


def saved_model(folder: Path, name: str, *, seed: int = 0, **changes) -> Path:
    """Folder of a random model and a tokenizer that fits it."""
    made = folder / name
    tiny_model(name, seed=seed, **changes).save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made
