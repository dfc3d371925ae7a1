"""The compressor of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import BudgetError, InputError
from ...pruners.catalogue import METHODS
from ...pruners.contract import Pruner
from ...pruners.models.block_layouts import layout_of
from .compressor import LayerStatistics, block_tensors
from .group_scores import best_places, compressed_row, group_scores
from .group_signals import statistics_of
from .slicing import slice_experts
from .walk import LayerVisit, Made
from .widths import both_names, dense_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """How experts are removed: a method of the catalogue for experts, its options, and a seed."""

    method: str = "reap"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def pruner(self) -> Pruner:
        """The method, set up."""
        return METHODS[self.method](**self.options)


class ExpertCompressor:
    """Removes experts, as many in every layer that has them; see `Compressor`.

    Raises
    ------
    BudgetError
        A layer keeps no expert.
    InputError
        Layers keep different numbers: a configuration has one for all.
    """

    def __init__(
        self, config: Any, plan: Sequence[Mapping[str, Any]], options: ExpertOptions
    ) -> None:
        self.options, self.model_config = options, config
        self.layout = layout_of(config)
        if self.layout.expert_count is None:
            raise InputError(
                f"expected a mixture of experts; a {config.model_type} has none. Prune groups."
            )
        self.pruner = options.pruner()
        self.rows = [row for row in plan if row["unit"] == "expert"]
        self.count = self._count()
        touched = [row for row in self.rows if row["keep"] < row["total"]]
        choose = any(row.get("kept") is None for row in touched)
        self.wanted = statistics_of(self.pruner) if choose else frozenset()

    def _count(self) -> int:
        """Experts of every layer."""
        assert self.layout.expert_count is not None
        total = int(getattr(self.model_config, self.layout.expert_count))
        depth = int(getattr(self.model_config, self.layout.depth))
        dense = set(dense_layers(self.layout, self.model_config))
        counts = {layer: total for layer in range(depth) if layer not in dense}
        counts |= {int(row["layer"]): int(row["keep"]) for row in self.rows}
        first = min(counts)
        for layer, count in sorted(counts.items()):
            if count < 1:
                raise BudgetError(
                    f"layer {layer} experts: expected at least 1 of {total} to stay, the nearest"
                    f" possible; found {count}. Lower the sparsity."
                )
            if count != counts[first]:
                raise InputError(
                    f"expected as many experts in every layer; layer {first} keeps"
                    f" {counts[first]} of {total} and layer {layer} keeps {count}. Plan experts"
                    " uniformly."
                )
        return counts[first]

    def config(self) -> Mapping[str, Any]:
        """Number of experts, and of those that a token goes to; known from the plan."""
        assert self.layout.expert_count is not None
        a_token = int(getattr(self.model_config, self.layout.experts_a_token))
        changes = {
            self.layout.expert_count: self.count,
            self.layout.experts_a_token: min(a_token, self.count),
        }
        return both_names(self.model_config, changes)

    def __call__(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: Sequence[Mapping[str, Any]]
    ) -> Made:
        """See `Compressor`."""
        rows = [row for row in plan if row["unit"] == "expert"]
        done = []
        for row in rows:
            if not self.layout.has_experts(visit.block):
                raise InputError(f"layer {visit.layer}: expected experts, found none. Plan anew.")
            kept = list(range(row["total"]))
            if row["keep"] < row["total"]:
                kept = self._kept(visit, statistics, row)
                slice_experts(visit.block, self.layout, kept)
            done.append(self._row(row, kept))
        return block_tensors(visit), done

    def _kept(
        self, visit: LayerVisit, statistics: LayerStatistics, row: Mapping[str, Any]
    ) -> list[int]:
        if row.get("kept") is not None:
            return [int(place) for place in row["kept"]]
        scores = group_scores(
            self.pruner,
            visit.block,
            self.layout,
            self.model_config,
            statistics,
            visit.layer,
            seed=self.options.seed,
        )
        return best_places(scores, row, self.options.method)

    def _row(self, row: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
        a_token = int(getattr(self.model_config, self.layout.experts_a_token))
        capped = f"a token goes to {len(kept)} experts, before {a_token}"
        return compressed_row(row, kept, note=capped if len(kept) < a_token else "")
