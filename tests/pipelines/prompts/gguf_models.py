"""Small Llama models as GGUF files, for llama.cpp's server and stock transformers alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ...pruners.signals.stories260k import StoryTokenizer, load_stories

STORIES = Path(__file__).parents[4] / "shared" / "data" / "ckpt_stories260K"
# Kinds of tokens in a GGUF file.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass
class Small:
    """A model, its vocabulary as bytes (id order), and the merges' scores."""

    model: LlamaForCausalLM
    pieces: list[bytes]
    scores: list[float]
    tokenizer: StoryTokenizer

    def next_logprobs(self, text: str) -> list[tuple[bytes, float]]:
        """(bytes, log probability) of every token after a text, by stock transformers."""
        with torch.no_grad():
            logits = self.model(torch.tensor([self.tokenizer.encode(text)])).logits[0, -1]
        values = torch.log_softmax(logits.double(), -1).tolist()
        return list(zip(self.pieces, values, strict=True))


def stories() -> Small:
    """stories260K, a model that writes English."""
    tokenizer = StoryTokenizer(STORIES / "tok512.bin", 512)
    pieces = [*_first(), *tokenizer.pieces[259:]]
    return Small(load_stories(STORIES / "stories260K.bin"), pieces, tokenizer.scores, tokenizer)


def random_small() -> Small:
    """A random model whose vocabulary is letters, and some words that no merge reaches."""
    words = [b" good", b" bad", b" go", b"good"]
    pieces = [*_first(), b" ", *(bytes([b]) for b in b"abcdefghijklmnopqrstuvwxyz.,"), *words]
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(8)  # so that the words before matter
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[131:259].mul_(0.8)  # parts of letters are written, but not always
        model.lm_head.weight[-len(words) :].mul_(1.4)
    tokenizer = StoryTokenizer.__new__(StoryTokenizer)
    tokenizer.pieces, tokenizer.scores = pieces, [0.0] * len(pieces)
    tokenizer.ids = {piece: number for number, piece in reversed(list(enumerate(pieces)))}
    tokenizer.ids |= {piece: n for n, piece in enumerate(pieces) if n >= 259}
    return Small(model, pieces, tokenizer.scores, tokenizer)


def _first() -> list[bytes]:
    return [b"<unk>", b"<s>", b"</s>", *(bytes([b]) for b in range(256))]


def write_gguf(small: Small, path: Path) -> Path:
    """Write float32 weights and a SentencePiece vocabulary."""
    import gguf

    config = small.model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_vocab_size(config.vocab_size)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(out, small)
    state = {name: value.float().numpy() for name, value in small.model.state_dict().items()}
    out.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    out.add_tensor("output_norm.weight", state["model.norm.weight"])
    out.add_tensor("output.weight", state["lm_head.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, short in _PARTS.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if short in heads:
                weight = _side_by_side(weight, heads[short])
            out.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _add_vocabulary(out, small: Small) -> None:
    spelt = [piece.replace(b" ", "▁".encode()) for piece in small.pieces]
    spelt[3:259] = [b"<0x%02X>" % byte for byte in range(256)]
    normal = len(spelt) - 259
    out.add_tokenizer_model("llama")
    out.add_token_list(spelt)
    out.add_token_scores(small.scores)
    out.add_token_types([_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * normal])
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    # A chat of one message is its text.
    out.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs stand half a head apart in transformers, and side by side in llama.cpp."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
