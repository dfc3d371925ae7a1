"""The compressor of whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import BudgetError
from ...pruners.models.block_layouts import layout_of
from .compressor import LayerStatistics, block_tensors
from .walk import LayerVisit, Made
from .widths import dense_layers


class LayerCompressor:
    """Drops the layers of which a plan keeps 0; see `Compressor`.

    Raises BudgetError where no layer stays.
    """

    wanted: frozenset[str] = frozenset()

    def __init__(self, config: Any, plan: Sequence[Mapping[str, Any]]) -> None:
        self.model_config, self.layout = config, layout_of(config)
        depth = int(getattr(config, self.layout.depth))
        gone = {int(row["layer"]) for row in plan if row["unit"] == "layer" and row["keep"] == 0}
        self.dropped = gone & set(range(depth))
        if len(self.dropped) == depth:
            raise BudgetError(
                f"expected at least 1 of {depth} layers to stay, the nearest possible; the plan"
                " drops all of them. Lower the sparsity."
            )

    def config(self) -> Mapping[str, Any]:
        """Which layers are dense, in the old numbers, where a stride said so; else nothing.

        Depth and lists by layer follow from the layers that are dropped.
        """
        if int(getattr(self.model_config, "decoder_sparse_step", 1) or 1) == 1:
            return {}
        dense = dense_layers(self.layout, self.model_config)
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """See `Compressor`."""
        gone = visit.layer in self.dropped
        row = {
            "module": "",
            "unit": "layer",
            "total": 1,
            "kept": 0 if gone else 1,
            "bits": None,
            "group_size": None,
            "error": None,
            "positions": None,
            "note": "dropped" if gone else "",
        }
        if gone:
            visit.dropped = True
            return {}, [row]
        return block_tensors(visit), [row] if plan else []
