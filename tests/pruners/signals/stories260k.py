"""A real small model, stories260K (llama2.c's layout), as a LlamaForCausalLM."""

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def load_stories(path: Path) -> LlamaForCausalLM:
    """Read the header and the float32 arrays behind it, layer by layer within each name."""
    data = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", data[:28])
    values = np.frombuffer(data, np.float32, offset=28)
    kv_width = width // heads * kv_heads
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return torch.from_numpy(values[at - count : at].reshape(shape).copy())

    state = {"model.embed_tokens.weight": take(vocabulary, width)}
    parts = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "mlp.up_proj": (inner, width),
    }
    for name, shape in parts.items():
        stacked = take(layers, *shape)
        for layer in range(layers):
            part = stacked[layer]
            if name == "self_attn.q_proj":
                part = _split_halves(part, heads)
            elif name == "self_attn.k_proj":
                part = _split_halves(part, kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = part
    state["model.norm.weight"] = take(width)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs stand side by side in llama2.c, and half a head apart in transformers."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


class StoryTokenizer:
    """tok512.bin: greedy merges by score, as llama2.c encodes; enough for plain English."""

    def __init__(self, path: Path, size: int) -> None:
        data = path.read_bytes()
        at = 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        for _ in range(size):
            score, count = struct.unpack_from("fi", data, at)
            at += 8
            self.pieces.append(data[at : at + count])
            self.scores.append(score)
            at += count
        self.ids = {piece: number for number, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Ids with the begin-of-sequence token first."""
        ids: list[int] = []
        for letter in " " + text:
            found = self.ids.get(letter.encode())
            ids += [found] if found is not None else [byte + 3 for byte in letter.encode()]
        while True:
            best, place = -1e10, -1
            for i in range(len(ids) - 1):
                joined = self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if joined is not None and self.scores[joined] > best:
                    best, place, merged = self.scores[joined], i, joined
            if place < 0:
                return [1, *ids]
            ids[place : place + 2] = [merged]


def fast_tokenizer(path: Path, size: int) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers' fast kind: merges in the order of their scores."""
    slow = StoryTokenizer(path, size)
    names = [piece.decode().replace(" ", "▁") for piece in slow.pieces]
    names[:3] = ["<unk>", "<s>", "</s>"]
    names[3:259] = [f"<0x{number:02X}>" for number in range(256)]
    vocabulary = {name: number for number, name in reversed(list(enumerate(names)))}
    merges = []
    for number in sorted(range(259, size), key=lambda number: -slow.scores[number]):
        name = names[number]
        halves = [(name[:at], name[at:]) for at in range(1, len(name))]
        merges += [pair for pair in halves if set(pair) <= set(vocabulary)]
    made = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
