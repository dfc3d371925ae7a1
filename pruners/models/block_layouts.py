"""Where the parts of a transformer block stand in each architecture that can be compressed.

A layout names modules by their paths inside one block of transformers' own classes, and the keys
of config.json that say how many heads, neurons, experts and layers there are. A new architecture
is one entry of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ModelError

Role = Literal["query", "key", "value", "qkv", "output", "gate", "up", "down"]
ATTENTION_ROLES: frozenset[str] = frozenset({"query", "key", "value", "qkv", "output"})


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix of a block: its module's path, what it is for, and of which expert."""

    name: str
    role: Role
    expert: int | None = None
    shared: bool = False  # of a shared expert, which every token passes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """An architecture's block.

    Attributes
    ----------
    head
        What the model is: causal, or masked (an encoder).
    blocks
        Path of the list of blocks in the model with its head.
    attention, mlp
        Paths of the attention and of the feed-forward module in a block; `mlp` is "" where its
        matrices stand in the block itself.
    query, key, value, output, gate, up, down
        Paths in a block. Of a fused matrix the three first are the same; `gate` is None where
        there is none. In a mixture of experts the last three are names inside one expert.
    experts, router
        Paths in a block of the list of experts and of the router; None where there are none.
    shared
        Path in a block of an expert that every token passes.
    attention_norm, mlp_norm
        Paths in a block of the norms before (or, in BERT, after) the two halves.
    transposed
        Matrices are stored (in, out), as GPT-2's are.
    depth, heads, kv_heads, width, expert_count, experts_a_token, expert_width
        Keys of the configuration; `kv_heads` None where every head has its own keys.
    output_bias, down_bias
        Whether those matrices have a bias: True, False, or the key of the switch in the
        configuration (which may give the other matrices of that half one too).
    disk
        Module path inside a block to what it is called in files, for experts that files name
        otherwise.
    """

    head: Literal["causal", "masked"] = "causal"
    blocks: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: str | None = None
    router: str | None = None
    shared: str | None = None
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    transposed: bool = False
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    expert_count: str | None = None
    experts_a_token: str = "num_experts_per_tok"
    expert_width: str | None = None
    output_bias: bool | str = False
    down_bias: bool | str = False
    disk: Mapping[str, str] | None = None

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one matrix, in this order along its outputs."""
        return self.query == self.key

    def matrices(self, block: nn.Module) -> list[Matrix]:
        """The prunable matrices of a block, in the order of the forward pass.

        Routers and the gate of a shared expert are left out: they are small and decide a lot.
        """
        found: list[Matrix] = []
        if self.fused:
            found.append(Matrix(self.query, "qkv"))
        else:
            found += [
                Matrix(self.query, "query"),
                Matrix(self.key, "key"),
                Matrix(self.value, "value"),
            ]
        found.append(Matrix(self.output, "output"))
        feed: list[tuple[str | None, Role]] = [
            (self.gate, "gate"),
            (self.up, "up"),
            (self.down, "down"),
        ]
        if not self.has_experts(block):
            return found + [Matrix(name, role) for name, role in feed if name is not None]
        assert self.experts is not None
        within: list[tuple[str, int | None]] = [
            (f"{self.experts}.{number}", number)
            for number in range(block.get_submodule(self.experts).count)  # type: ignore[arg-type]
        ]
        if self.shared is not None and self.shared in dict(block.named_modules()):
            within.append((self.shared, None))
        return found + [
            Matrix(f"{path}.{name.rsplit('.', 1)[-1]}", role, number, shared=number is None)
            for path, number in within
            for name, role in feed
            if name is not None
        ]

    def has_experts(self, block: nn.Module) -> bool:
        """Whether a block's feed-forward part is a mixture of experts; not all layers' need be."""
        return self.experts is not None and self.experts in dict(block.named_modules())

    def input_of(self, matrix: Matrix) -> str:
        """The module under which statistics of a matrix's inputs are kept.

        Matrices that read the same numbers share them: query, key and value; gate and up.
        """
        if matrix.role in ("query", "key", "value", "qkv"):
            return self.query
        if matrix.role == "up" and self.gate is not None:
            return f"{matrix.name.rpartition('.')[0]}.{self.gate.rpartition('.')[2]}".lstrip(".")
        return matrix.name

    def sizes(self, config: Any) -> tuple[int, int, int]:
        """Query heads, key-value heads and numbers a head, as a configuration says."""
        heads = int(getattr(config, self.heads))
        kv = int(getattr(config, self.kv_heads) or heads) if self.kv_heads else heads
        hidden = int(config.hidden_size)
        size = getattr(config, "head_dim", None) or hidden // heads
        return heads, kv, int(size)

    def neurons(self, config: Any) -> int:
        """Neurons of a dense feed-forward part."""
        width = getattr(config, self.width, None)
        return int(width) if width is not None else 4 * int(config.hidden_size)

    def has_bias(self, config: Any, which: Literal["output", "down"]) -> bool:
        """Whether the matrix has a bias under this configuration."""
        switch = self.output_bias if which == "output" else self.down_bias
        return bool(getattr(config, switch)) if isinstance(switch, str) else switch


_LLAMA = BlockLayout(blocks="model.layers", output_bias="attention_bias", down_bias="mlp_bias")
_NO_BIAS = BlockLayout(blocks="model.layers")
_QWEN3 = BlockLayout(blocks="model.layers", output_bias="attention_bias")

LAYOUTS: dict[str, BlockLayout] = {
    "llama": _LLAMA,
    "mistral": _NO_BIAS,
    "qwen2": _NO_BIAS,
    "qwen3": _QWEN3,
    "gpt2": BlockLayout(
        blocks="transformer.h",
        attention="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        transposed=True,
        kv_heads=None,
        depth="n_layer",
        heads="n_head",
        width="n_inner",
        output_bias=True,
        down_bias=True,
    ),
    "opt": BlockLayout(
        blocks="model.decoder.layers",
        mlp="",
        output="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        kv_heads=None,
        width="ffn_dim",
        output_bias="enable_bias",
        down_bias="enable_bias",
    ),
    "bert": BlockLayout(
        head="masked",
        blocks="bert.encoder.layer",
        attention="attention.self",
        mlp="",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        gate=None,
        up="intermediate.dense",
        down="output.dense",
        attention_norm="attention.output.LayerNorm",
        mlp_norm="output.LayerNorm",
        kv_heads=None,
        output_bias=True,
        down_bias=True,
    ),
    "mixtral": BlockLayout(
        blocks="model.layers",
        experts="mlp.experts",
        router="mlp.gate",
        expert_count="num_local_experts",
        expert_width="intermediate_size",
        disk={
            "mlp.": "block_sparse_moe.",
            ".gate_proj.": ".w1.",
            ".up_proj.": ".w3.",
            ".down_proj.": ".w2.",
        },
    ),
    "qwen2_moe": BlockLayout(
        blocks="model.layers",
        experts="mlp.experts",
        router="mlp.gate",
        shared="mlp.shared_expert",
        expert_count="num_experts",
        expert_width="moe_intermediate_size",
    ),
    "qwen3_moe": BlockLayout(
        blocks="model.layers",
        experts="mlp.experts",
        router="mlp.gate",
        expert_count="num_experts",
        expert_width="moe_intermediate_size",
        output_bias="attention_bias",
    ),
}


def layout_of(config: Any) -> BlockLayout:
    """The layout of a configuration's architecture.

    Raises ModelError where there is none, with the names of those there are.
    """
    kind = getattr(config, "model_type", None)
    if kind not in LAYOUTS:
        raise ModelError(
            f"expected an architecture whose blocks are known ({', '.join(LAYOUTS)}); found"
            f" {kind!r}. Compress a model of one of these, or add its layout to"
            " pruners/models/block_layouts.py."
        )
    return LAYOUTS[kind]


def weight_of(module: nn.Module, layout: BlockLayout) -> Tensor:
    """The weight of a matrix as (out, in): a view, so that writing to it changes the module."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if layout.transposed else weight


def set_weight(module: nn.Module, layout: BlockLayout, weight: Tensor) -> None:
    """Give a matrix a new weight (out, in), of another size where wanted."""
    stored = weight.T if layout.transposed else weight
    made = nn.Parameter(stored.contiguous(), requires_grad=False)
    module.weight = made
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.nf, module.nx = weight.shape  # type: ignore[assignment]


class SplitExperts(nn.Module):
    """Experts one by one, each a gated feed-forward part, in place of stacked weights.

    Called as transformers calls its stacked ones: hidden (T, d), index (T, k) and weight (T, k)
    of the experts chosen for each token; gives (T, d).
    """

    def __init__(self, count: int, hidden: int, width: int, activation: Any) -> None:
        super().__init__()
        self.act_fn = activation
        for number in range(count):
            expert = nn.Module()
            expert.gate_proj = nn.Linear(hidden, width, bias=False)
            expert.up_proj = nn.Linear(hidden, width, bias=False)
            expert.down_proj = nn.Linear(width, hidden, bias=False)
            self.add_module(str(number), expert)
        self.count = count

    def expert(self, number: int, hidden: Tensor) -> Tensor:
        """What one expert makes of (T, d)."""
        part: Any = self.get_submodule(str(number))
        made: Tensor = part.down_proj(self.act_fn(part.gate_proj(hidden)) * part.up_proj(hidden))
        return made

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs."""
        made = torch.zeros_like(hidden)
        for number in range(self.count):
            token, place = torch.where(index == number)
            if token.numel():
                out = self.expert(number, hidden[token]) * weight[token, place, None]
                made.index_add_(0, token, out.to(made.dtype))
        return made
