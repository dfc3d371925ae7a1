"""Heads, neurons and experts taken out of a block: cut away, or set to zero at full width.

Both give the same function. A cut block may be padded: the groups that stay come first, in their
order, and groups of zeros fill it up to a width that all layers share. Positions are those of
whole groups: a key-value head with its query heads, a neuron, an expert.

A head set to zero adds nothing: its values and its columns of the output are zero. So does a
neuron whose rows and column are zero, whatever the activation makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import BudgetError, InputError
from ...pruners.models.block_layouts import BlockLayout, set_weight, weight_of

HeadRole = Literal["query", "key", "value", "qkv", "output"]


def head_index(role: HeadRole, layout: BlockLayout, config: Any, groups: Sequence[int]) -> Tensor:
    """Where groups stand along a matrix, (len(groups) * their rows,) int64.

    Along the outputs of query, key, value and qkv, and along the inputs of output.
    """
    heads, kv, size = layout.sizes(config)
    wide = heads // kv * size
    if role in ("query", "output"):
        return _spread(groups, wide)
    if role == "qkv":
        return torch.cat([_spread(groups, size) + start * heads * size for start in range(3)])
    return _spread(groups, size)


def _spread(groups: Sequence[int], size: int) -> Tensor:
    first = torch.tensor(list(groups), dtype=torch.int64)[:, None] * size
    return (first + torch.arange(size)).reshape(-1)


def can_slice_heads(layout: BlockLayout) -> bool:
    """Whether files with fewer heads load: the configuration says the size of a head by itself.

    GPT-2, OPT and BERT derive it from the hidden size; their heads are set to zero.
    """
    return layout.kv_heads is not None and not layout.fused


def slice_heads(
    block: nn.Module,
    layout: BlockLayout,
    config: Any,
    keep: Sequence[int],
    *,
    width: int | None = None,
) -> None:
    """Leave only the key-value groups `keep` (ascending) in a block, then zeros up to `width`.

    Raises InputError where the architecture cannot have fewer heads.
    """
    if not can_slice_heads(layout):
        raise InputError(
            f"{config.model_type}: expected an architecture whose configuration gives the size of"
            " a head; found one that derives it from the hidden size. Set its heads to zero"
            " (zero_heads), or remove neurons only."
        )
    pad = max((width or 0) - len(keep), 0)
    total = layout.sizes(config)[1]
    _check_positions(keep, total, "key-value group")
    for name, role in _head_matrices(layout):
        one = len(head_index(role, layout, config, [0]))
        index = head_index(role, layout, config, keep)
        _cut(block.get_submodule(name), layout, index, pad * one, inputs=role == "output")


def zero_heads(block: nn.Module, layout: BlockLayout, config: Any, keep: Sequence[int]) -> None:
    """Set all key-value groups but `keep` to zero, at full width."""
    total = layout.sizes(config)[1]
    _check_positions(keep, total, "key-value group")
    gone = [group for group in range(total) if group not in set(keep)]
    for name, role in _head_matrices(layout):
        index = head_index(role, layout, config, gone)
        _blank(block.get_submodule(name), layout, index, inputs=role == "output")


def _head_matrices(layout: BlockLayout) -> list[tuple[str, HeadRole]]:
    if layout.fused:
        return [(layout.query, "qkv"), (layout.output, "output")]
    return [
        (layout.query, "query"),
        (layout.key, "key"),
        (layout.value, "value"),
        (layout.output, "output"),
    ]


def slice_neurons(
    block: nn.Module, layout: BlockLayout, keep: Sequence[int], *, width: int | None = None
) -> None:
    """Leave only the neurons `keep` (ascending) of a dense part, then zeros up to `width`."""
    index = _neurons(block, layout, keep)
    pad = max((width or 0) - len(keep), 0)
    for name in (layout.gate, layout.up, layout.down):
        if name is not None:
            module = block.get_submodule(name)
            _cut(module, layout, index, pad, inputs=name == layout.down)


def zero_neurons(block: nn.Module, layout: BlockLayout, keep: Sequence[int]) -> None:
    """Set all neurons but `keep` to zero, at full width."""
    index = _neurons(block, layout, keep)
    total = weight_of(block.get_submodule(layout.down), layout).shape[1]
    gone = torch.ones(total, dtype=torch.bool)
    gone[index] = False
    for name in (layout.gate, layout.up, layout.down):
        if name is not None:
            module = block.get_submodule(name)
            _blank(module, layout, gone.nonzero()[:, 0], inputs=name == layout.down)


def _neurons(block: nn.Module, layout: BlockLayout, keep: Sequence[int]) -> Tensor:
    if layout.has_experts(block):
        raise InputError(
            "expected a dense feed-forward part; found experts. Prune them with a method for"
            " experts (reap, easy_ep, expert_frequency)."
        )
    total = weight_of(block.get_submodule(layout.down), layout).shape[1]
    _check_positions(keep, total, "neuron")
    return torch.tensor(list(keep), dtype=torch.int64)


def slice_experts(block: nn.Module, layout: BlockLayout, keep: Sequence[int]) -> None:
    """Leave only the experts `keep` (ascending), and their rows of the router.

    A token goes to as many experts as before, or to all that are left where those are fewer. The
    router's softmax is over the experts that are left.
    """
    if layout.experts is None or layout.router is None or not layout.has_experts(block):
        raise InputError("expected a mixture of experts, found a dense feed-forward part.")
    experts: Any = block.get_submodule(layout.experts)
    _check_positions(keep, experts.count, "expert")
    parts = [experts.get_submodule(str(number)) for number in keep]
    for number in range(experts.count):
        del experts._modules[str(number)]
    for number, part in enumerate(parts):
        experts.add_module(str(number), part)
    experts.count = len(parts)
    router: Any = block.get_submodule(layout.router)
    index = torch.tensor(list(keep), dtype=torch.int64, device=router.weight.device)
    router.weight = nn.Parameter(router.weight.data[index].contiguous(), requires_grad=False)
    parent: Any = block.get_submodule(layout.router.rpartition(".")[0])
    for owner in (router, parent):
        if hasattr(owner, "top_k"):
            owner.top_k = min(owner.top_k, len(parts))
        if hasattr(owner, "num_experts"):
            owner.num_experts = len(parts)


def add_biases(block: nn.Module, layout: BlockLayout, names: Sequence[str]) -> None:
    """Give modules that have none a bias of zeros, as their configuration now demands."""
    for name in names:
        module: Any = block.get_submodule(name)
        if module.bias is None:
            weight = weight_of(module, layout)
            zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            module.bias = nn.Parameter(zeros, requires_grad=False)


def _cut(module: Any, layout: BlockLayout, index: Tensor, pad: int, *, inputs: bool) -> None:
    """Leave some outputs (or inputs) of a matrix, in the order of `index`, then `pad` zeros."""
    weight = weight_of(module, layout)
    index = index.to(weight.device)
    axis = 1 if inputs else 0
    made = weight.index_select(axis, index)
    if pad:
        shape = (weight.shape[0], pad) if inputs else (pad, weight.shape[1])
        made = torch.cat([made, weight.new_zeros(shape)], axis)
    set_weight(module, layout, made)
    if not inputs and module.bias is not None:
        bias = torch.cat([module.bias.data[index], module.bias.data.new_zeros(pad)])
        module.bias = nn.Parameter(bias, requires_grad=False)


def _blank(module: Any, layout: BlockLayout, index: Tensor, *, inputs: bool) -> None:
    weight = weight_of(module, layout)
    index = index.to(weight.device)
    if inputs:
        weight[:, index] = 0
        return
    weight[index] = 0
    if module.bias is not None:
        module.bias.data[index] = 0


def _check_positions(keep: Sequence[int], total: int, what: str) -> None:
    if not keep:
        raise BudgetError(
            f"expected at least one {what} of {total} to stay, found none. Keep 1, the nearest"
            " that is possible, or drop whole layers instead."
        )
    ascending = all(a < b for a, b in pairwise(keep))
    if not ascending or keep[0] < 0 or keep[-1] >= total:
        raise InputError(
            f"expected ascending positions of {total} {what}s; found {list(keep)[:8]}. Take them"
            " from the plan of this model."
        )
