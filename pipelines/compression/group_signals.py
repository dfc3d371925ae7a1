"""What the methods over groups, experts and layers decide by, made from a block's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError
from ...pruners.contract import Array, Pruner, Signals
from ...pruners.models.block_layouts import BlockLayout, Matrix, weight_of
from ...pruners.weight.llm_pruner import LlmPruner
from .compressor import LayerStatistics
from .parts import half_of
from .slicing import head_index

_STATISTICS = {
    "channel_variance": frozenset({"m2"}),
    "channel_norm": frozenset({"sum_squares"}),
    "neuron_norm": frozenset({"sum_squares"}),
    "tensor_salience": frozenset({"gradient", "gradient_square"}),
    "block_cosine": frozenset({"cosine"}),
    **{
        name: frozenset({name})
        for name in ("expert_tokens", "expert_gate", "expert_norm", "expert_reap", "expert_easy")
    },
}


def statistics_of(method: Pruner) -> frozenset[str]:
    """Names of the statistics that a method's signals are made from."""
    found: set[str] = set()
    for name in method.needs:
        found |= _STATISTICS.get(name, frozenset())
    if isinstance(method, LlmPruner) and method.order in ("vector", "element1"):
        found -= {"gradient_square"}
    return frozenset(found)


def group_id(layer: int, half: int, place: int) -> int:
    """Id of a group: layer, half (0 attention, 1 feed-forward) and place in it."""
    return (2 * layer + half) << 32 | place


class _Here:
    """One layer's statistics, asked for by name."""

    def __init__(self, statistics: LayerStatistics, layer: int) -> None:
        self.statistics, self.layer = statistics, layer

    def read(self, module: str, name: str) -> Tensor:
        if (module, name) not in self.statistics:
            raise InputError(
                f"layer {self.layer}, {module or 'block'}: expected the statistic `{name}`; found"
                " none. Add it to the `statistics` of the weight_statistics step."
            )
        found = self.statistics[module, name]
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"layer {self.layer}, {module or 'block'}: expected a finite statistic `{name}`;"
                " found a NaN or an infinity. Compute the statistics anew, in a wider dtype."
            )
        return found

    def count(self, module: str) -> int:
        count = int(self.read(module, "count"))
        if count < 1:
            raise InputError(
                f"layer {self.layer}, {module or 'block'}: expected statistics over at least one"
                " token; found none. Calibrate on more rows."
            )
        return count


def layer_signals(
    method: Pruner,
    block: nn.Module,
    layout: BlockLayout,
    config: Any,
    statistics: LayerStatistics,
    layer: int,
) -> dict[str, Signals]:
    """Signals of one layer's groups, by unit: "head" and "neuron", "expert", or "layer".

    A unit that the method does not score (CFSP: heads) or the layer does not have (neurons of a
    mixture of experts) is left out. Ids are those of `group_id`.

    Raises InputError where a statistic is missing, by layer, module and name.
    """
    here = _Here(statistics, layer)
    if method.unit == "layer":
        return {"layer": _layer(method, here)}
    if method.unit == "expert":
        if not layout.has_experts(block):
            return {}
        return {"expert": _experts(method, block, layout, here)}
    made: dict[str, Signals] = {}
    matrices = layout.matrices(block)
    if not method.needs & {"down_mass", "neuron_norm"}:
        groups = layout.sizes(config)[1]

        def where(matrix: Matrix) -> Tensor:
            role: Any = matrix.role
            per = [head_index(role, layout, config, [group]) for group in range(groups)]
            return torch.stack(per)

        half = [one for one in matrices if half_of(one) == "attention"]
        made["head"] = _groups(method, block, layout, here, half, groups, where)
    if not layout.has_experts(block):
        half = [one for one in matrices if half_of(one) == "mlp"]
        total = weight_of(block.get_submodule(layout.down), layout).shape[1]
        made["neuron"] = _groups(
            method, block, layout, here, half, total, lambda _: torch.arange(total)[:, None]
        )
    return made


def _layer(method: Pruner, here: _Here) -> Signals:
    made: dict[str, Array] = {"id": np.array([here.layer], np.int64)}
    if "block_cosine" in method.needs:
        mean = float(here.read("", "cosine")) / here.count("")
        made["block_cosine"] = np.array([mean], np.float32)
    return Signals(made)


def _experts(method: Pruner, block: nn.Module, layout: BlockLayout, here: _Here) -> Signals:
    assert layout.experts is not None
    experts: Any = block.get_submodule(layout.experts)
    made = _names(here.layer, 1, experts.count)
    for name in sorted(method.needs - {"id", "part"}):
        dtype = np.int64 if name == "expert_tokens" else np.float32
        made[name] = here.read(layout.experts, name).cpu().numpy().astype(dtype)
    return Signals(made)


def _names(layer: int, half: int, count: int) -> dict[str, Array]:
    return {
        "id": group_id(layer, half, 0) + np.arange(count, dtype=np.int64),
        "part": np.full(count, 2 * layer + half, np.int64),
    }


def _groups(
    method: Pruner,
    block: nn.Module,
    layout: BlockLayout,
    here: _Here,
    matrices: Sequence[Matrix],
    count: int,
    where: Callable[[Matrix], Tensor],
) -> Signals:
    """Signals of the groups of one half; `where` gives the channels (count, c) of a matrix."""
    last = matrices[-1]
    weights = {
        one.name: _outputs(weight_of(block.get_submodule(one.name), layout), one)
        for one in matrices
    }
    made = _names(here.layer, 0 if last.role == "output" else 1, count)
    if "cost" in method.needs:
        whole = sum(weight.numel() for weight in weights.values())
        made["cost"] = np.full(count, whole // count, np.int64)
    if "weight_square" in method.needs:
        made["weight_square"] = _f32(
            sum(_sum(w.float().square().sum(1), where(m)) for m, w in _zip(matrices, weights))
        )
    if "channel_offset" in method.needs:
        channels = where(last)
        made["channel_offset"] = np.arange(count + 1, dtype=np.int64) * channels.shape[1]
        found = _channels(method, here, layout.input_of(last), weights[last.name])
        made |= {name: _f32(values[channels.reshape(-1)]) for name, values in found.items()}
    if "down_mass" in method.needs:
        made |= _neurons(here, layout, matrices, weights)
    if isinstance(method, LlmPruner):
        made |= _salience(method, here, matrices, weights, where)
    return Signals(made)


def _zip(matrices: Sequence[Matrix], weights: dict[str, Tensor]) -> list[tuple[Matrix, Tensor]]:
    return [(matrix, weights[matrix.name]) for matrix in matrices]


def _outputs(weight: Tensor, matrix: Matrix) -> Tensor:
    """A matrix with the channels of its groups in front: (channels, others)."""
    return weight.T if matrix.role in ("output", "down") else weight


def _sum(values: Tensor, channels: Tensor) -> Tensor:
    """Sum over each group's channels, (count,) float64."""
    return values.cpu().double()[channels].sum(1)


def _f32(values: Any) -> Array:
    made: Array = torch.as_tensor(values).cpu().float().numpy()
    return made


def _channels(method: Pruner, here: _Here, module: str, weight: Tensor) -> dict[str, Tensor]:
    """Arrays over the channels (in,) of the last matrix, given as (in, out)."""
    made: dict[str, Tensor] = {}
    if "channel_variance" in method.needs:
        made["channel_variance"] = here.read(module, "m2").cpu() / here.count(module)
    if "channel_square" in method.needs:
        made["channel_square"] = weight.float().square().sum(1).cpu()
    if "channel_norm" in method.needs:
        made["channel_norm"] = (here.read(module, "sum_squares").cpu() / here.count(module)).sqrt()
    if "channel_mass" in method.needs:
        made["channel_mass"] = weight.float().abs().mean(1).cpu()
    return made


def _neurons(
    here: _Here, layout: BlockLayout, matrices: Sequence[Matrix], weights: dict[str, Tensor]
) -> dict[str, Array]:
    made = {f"{m.role}_mass": _f32(w.float().abs().sum(1)) for m, w in _zip(matrices, weights)}
    module = layout.input_of(matrices[-1])
    made["neuron_norm"] = _f32((here.read(module, "sum_squares") / here.count(module)).sqrt())
    return made


def _salience(
    method: LlmPruner,
    here: _Here,
    matrices: Sequence[Matrix],
    weights: dict[str, Tensor],
    where: Callable[[Matrix], Tensor],
) -> dict[str, Array]:
    """Salience of each group's share of each matrix; query, key and value in one count as three."""
    columns: list[Tensor] = []
    for matrix, weight in _zip(matrices, weights):
        rows = max(int(here.read(matrix.name, "gradient_rows")), 1)
        given = {
            name: _outputs(here.read(matrix.name, name), matrix).to(weight.device) / rows
            for name in sorted(statistics_of(method))
        }
        channel = method.channel_salience(
            weight=weight.float(),
            gradient=given.get("gradient"),
            gradient_square=given.get("gradient_square"),
        )
        channels = where(matrix)
        shares = channels.chunk(3 if matrix.role == "qkv" else 1, dim=1)
        columns += [_sum(channel, share) for share in shares]
    table = torch.stack(columns, 1)
    offset = np.arange(len(table) + 1, dtype=np.int64) * table.shape[1]
    return {"tensor_offset": offset, "tensor_salience": _f32(table.reshape(-1))}
