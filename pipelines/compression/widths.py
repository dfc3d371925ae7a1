"""How wide the layers of a compressed model are, so that stock transformers loads it.

A configuration has one number of heads and one of neurons for all layers. Where a plan's counts
differ, layers are cut to the widest of them and filled up with zeros, or zeroed at full width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import BudgetError, InputError
from ...pruners.models.block_layouts import BlockLayout
from .slicing import can_slice_heads

Widths = Literal["uniform", "padded", "masked"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ModelWidths:
    """Groups a layer of the compressed model.

    Attributes
    ----------
    head, neuron
        Key-value groups and neurons of every layer; None where they stay as they are (removed
        groups are then zeros at full width).
    config
        Keys of config.json that say so.
    note
        Why heads are not cut as the plan says, or "".
    """

    head: int | None = None
    neuron: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def model_widths(
    layout: BlockLayout,
    config: Any,
    plan: Sequence[Row],
    *,
    widths: Widths,
    align: int = 1,
    convert: bool = False,
) -> ModelWidths:
    """The widths that a plan asks for.

    Parameters
    ----------
    align
        The width of neurons is a multiple of it, or the full one.
    convert
        A Llama may become a Mistral where its own configuration refuses the number of heads.

    Raises
    ------
    BudgetError
        A layer keeps no group, or a number of neurons that is no multiple of `align`; the
        nearest possible is named.
    InputError
        Layers keep different numbers and `widths` is "uniform".
    """
    rows = {unit: [row for row in plan if row["unit"] == unit] for unit in ("head", "neuron")}
    for row in plan:
        _check_row(row, align)
    if widths == "masked":
        return ModelWidths(note="zeros at full width")
    made: dict[str, Any] = {}
    neuron = _width(rows["neuron"], dense_layers(layout, config), widths)
    if neuron is not None:
        made[layout.width] = neuron
    if not can_slice_heads(layout):
        removed = any(row["keep"] < row["total"] for row in rows["head"])
        note = f"heads are zeros at full width: {config.model_type} cannot have fewer"
        return ModelWidths(None, neuron, made, note if removed else "")
    head = _width(rows["head"], list(range(int(getattr(config, layout.depth)))), widths)
    if head is None:
        return ModelWidths(None, neuron, made)
    fits = _loadable(layout, config, head, made)
    if fits > head and convert and can_convert(config):
        made |= {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": None,
        }
        fits = head
    total = layout.sizes(config)[1]
    note = "" if fits == head else f"{fits - head} of {fits} groups are zeros, so that it loads"
    if fits == total:
        note = f"heads are zeros at full width: no fewer than {total} groups load"
        return ModelWidths(None, neuron, made, note)
    return ModelWidths(fits, neuron, made | _heads(layout, config, fits), note)


def both_names(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes under a key's other name too, where an architecture has two for one number.

    A file may hold either, and transformers would read a stale one.
    """
    other = getattr(config, "attribute_map", {})
    return {**changes, **{other[key]: value for key, value in changes.items() if key in other}}


def can_convert(config: Any) -> bool:
    """Whether a Mistral without a window computes the same: a Llama without biases."""
    return config.model_type == "llama" and not (config.attention_bias or config.mlp_bias)


def dense_layers(layout: BlockLayout, config: Any) -> list[int]:
    """Layers whose feed-forward part is no mixture of experts."""
    depth = int(getattr(config, layout.depth))
    if layout.experts is None:
        return list(range(depth))
    only = set(getattr(config, "mlp_only_layers", None) or ())
    step = int(getattr(config, "decoder_sparse_step", 1) or 1)
    return [layer for layer in range(depth) if layer in only or (layer + 1) % step]


def _check_row(row: Row, align: int) -> None:
    keep, total = int(row["keep"]), int(row["total"])
    name = f"layer {row['layer']} {row['module']}"
    step = align if row["unit"] == "neuron" else 1
    if not 0 < keep <= total or (keep % step and keep != total):
        below, above = keep // step * step, min(-(-keep // step) * step, total)
        nearest = [str(number) for number in (below, above) if 0 < number <= total]
        raise BudgetError(
            f"{name}: expected a width of whole groups between 1 and {total}"
            f"{f' in multiples of {step}' if step > 1 else ''}; found {keep}. The nearest possible:"
            f" {' or '.join(nearest) or step}. Change the sparsity, or `align`."
        )
    kept = row.get("kept")
    if kept is not None and len(kept) != keep:
        raise InputError(f"{name}: expected {keep} positions; found {len(kept)}. Plan it anew.")


def _width(rows: Sequence[Row], layers: Sequence[int], widths: Widths) -> int | None:
    """One width for all layers; None where nothing is removed."""
    if not rows or all(row["keep"] == row["total"] for row in rows):
        return None
    total = int(rows[0]["total"])
    counts = dict.fromkeys(layers, total) | {int(row["layer"]): row["keep"] for row in rows}
    widest = int(max(counts.values()))
    other = next((layer for layer in sorted(counts) if counts[layer] != counts[layers[0]]), None)
    if widths == "uniform" and other is not None:
        raise InputError(
            f"expected layers of one width; layer {layers[0]} keeps {counts[layers[0]]} of {total}"
            f" {rows[0]['unit']}s and layer {other} keeps {counts[other]}. Plan with uniform"
            " widths, or choose widths: padded (cut to the widest) or masked."
        )
    return None if widest == total else widest


def _heads(layout: BlockLayout, config: Any, groups: int) -> dict[str, Any]:
    heads, kv, size = layout.sizes(config)
    assert layout.kv_heads is not None
    return {layout.heads: groups * (heads // kv), layout.kv_heads: groups, "head_dim": size}


def _loadable(layout: BlockLayout, config: Any, groups: int, changes: Mapping[str, Any]) -> int:
    """The fewest groups, at least `groups`, that the architecture's configuration accepts."""
    from huggingface_hub.errors import StrictDataclassError

    total = layout.sizes(config)[1]
    for number in range(groups, total):
        try:
            type(config)(**{**config.to_dict(), **changes, **_heads(layout, config, number)})
        except (ValueError, StrictDataclassError):
            continue
        return number
    return total
